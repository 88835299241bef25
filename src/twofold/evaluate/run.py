"""Runs a contender on tasks of lm-evaluation-harness and collects what `twofold frontier` reads."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from twofold.evaluate import machine
from twofold.evaluate.contender import Contender
from twofold.evaluate.inputs import ROLLING_TOKENS
from twofold.evaluate.results import Evaluation, TaskResult
from twofold.infer.backends import BackendName, Precision
from twofold.infer.journal import fingerprint

if TYPE_CHECKING:
    from twofold.evaluate.harness import TwofoldLM

_CACHE_FORMAT = 1
"""Goes up when the same request would get another answer."""
_STANDS_FIRST = ("acc_norm", "acc", "exact_match", "f1")
"""Metrics that stand for a task of which nothing else is known; else its first."""
_BOOTSTRAPS = 1000
"""For standard errors of metrics that are not means."""


def evaluate(
    contender: Contender,
    tasks: Sequence[Any],
    *,
    data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    count_stop: bool = False,
    backend: BackendName = "auto",
    precision: Precision | None = None,
    threads: int | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
    run_code: bool = False,
    command: str | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Scores of a model on tasks.

    Args:
        contender: the model; from now on it belongs to the evaluation, which may convert its weights.
        tasks: names (see `twofold.evaluate.tasks`), or tasks and groups of the harness.
        data: folder of local data for tasks that have some there.
        limit: the first examples of each task alone. For trying things out.
        num_fewshot: worked examples before each question. None: each task's own number, which a task that sets it to 0
            keeps in any case.
        chat: ask through the model's chat template, worked examples as turns.
        count_stop: see `TwofoldLM`.
        backend, precision, threads, batch_size: see `TwofoldLM`.
        cache: folder in which answers are kept as they come. An evaluation that was interrupted asks the model for the
            rest only; another model, or another setting that changes answers, does not find them.
        run_code: allow tasks that run programs which the model wrote, on this machine.
        command: noted in the result. Default: the command line of this process.
        show_progress: bars on stderr.

    Returns:
        One result for each task. A group's subtasks are one result, weighted as the harness weights them.

    Raises:
        ValueError: no task, an unknown one, a limit below 1, a task that would run code unasked, an example that is
            broken (the message names task and example), a model without tokenizer or, with `chat`, without chat
            template.
        ImportError: the extra `eval` is missing.
    """
    from twofold.evaluate.harness import TwofoldLM

    started = time.perf_counter()
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of at least one task, got {tasks!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 example, got {limit}; leave it out for all")
    parameters = sum(parameter.numel() for parameter in contender.model.parameters())
    answers_depend_on = {
        "backend": backend,
        "precision": precision,
        "chat": chat,
        "count_stop": count_stop,
        "kind": contender.kind,
    }
    file = None if cache is None else _cache_file(cache, contender, answers_depend_on)
    lm = TwofoldLM(
        contender,
        backend=backend,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        chat=chat,
        count_stop=count_stop,
        show_progress=show_progress,
    )
    given = [task if isinstance(task, str) else _name_of(task) for task in tasks]
    loaded = _loaded(tasks, data)
    writing_code = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if writing_code and not run_code:
        raise ValueError(
            f"{', '.join(writing_code)} would run programs that the model wrote on this machine; allow it with "
            "run_code (--run-code), or leave them out"
        )
    _check_examples(loaded["tasks"], limit)
    results = _ask(
        lm,
        loaded,
        limit=limit,
        num_fewshot=num_fewshot,
        use_cache=file,
        apply_chat_template=chat,
        confirm_run_unsafe_code=run_code,
    )
    scores = {name: _result(name, results, loaded["tasks"], lm) for name in _reported(loaded, results)}
    for name, score in scores.items():
        if score.n_truncated:
            warnings.warn(
                f"{name}: {score.n_truncated} of {score.n} examples are longer than the model can read "
                f"({lm.max_length} tokens) and lost their beginning",
                stacklevel=2,
            )
    config = contender.model.config
    return Evaluation(
        model=contender.name,
        path=contender.path,
        kind=contender.kind,
        parameters=parameters,
        tasks=scores,
        settings={
            **answers_depend_on,
            "tasks": given,
            "data": None if data is None else str(data),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "shots": {name: results["n-shot"].get(name) for name in scores},
            "likelihood_dtype": str(contender.model.lm_head.out_proj.weight.dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "encoder_positions": config.encoder.max_position_embeddings,
            "decoder_positions": config.decoder.max_position_embeddings,
            "decoder_start": config.decoder_start,
            "rolling_tokens": None if lm.inputs.goes_on else ROLLING_TOKENS,
            "task_versions": {name: results["versions"].get(name) for name in scores},
        },
        versions=machine.versions(),
        hardware=machine.hardware(lm.device),
        command=machine.command() if command is None else command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
    )


def _loaded(tasks: Sequence[Any], data: Path | None) -> dict[str, Any]:
    """Tasks and groups by name."""
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    found = [task for task in tasks if not isinstance(task, str)]
    if names:
        from twofold.evaluate.tasks import resolve

        found = [*resolve(names, data), *found]
    return dict(TaskManager(include_defaults=False).load(found))


def _name_of(task: Any) -> str:
    if isinstance(task, Mapping):
        return str(task.get("task") or task.get("group"))
    return str(getattr(task, "task_name", None) or getattr(task, "name", task))


def _check_examples(tasks: Mapping[str, Any], limit: int | None) -> None:
    """Render every example once, so that a broken one is found before hours of computing."""
    for name, task in tasks.items():
        for i, doc in task.doc_iterator(limit=limit):
            try:
                _check_example(task, doc)
            except Exception as error:
                raise ValueError(
                    f"task {name}, example {i} cannot be used: {type(error).__name__}: {error}; correct the data or "
                    f"leave it out: {str(doc)[:300]}"
                ) from error


def _check_example(task: Any, doc: Any) -> None:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    # Where several contexts are compared, the text says which is right. The harness scores any other number as wrong.
    right = text if isinstance(text, int) else target
    if isinstance(right, int) and not 0 <= right < len(choices):
        raise ValueError(f"the right choice is number {right} of {len(choices)}, counted from 0")


def _ask(lm: TwofoldLM, loaded: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The harness's own run."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    in_groups = {name for group in loaded["groups"].values() for name in group.child_names}
    roots = [
        item
        for part in (loaded["groups"], loaded["tasks"])
        for name, item in part.items()
        if name not in in_groups
    ]
    try:
        results: dict[str, Any] = simple_evaluate(
            lm,
            tasks=roots,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
            **options,
        )
    finally:
        lm.flush()
    return results


def _reported(loaded: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    """Names of results: of groups that have a score of their own, and of the tasks in no such group."""
    covered: set[str] = set()
    for name, group in loaded["groups"].items():
        if name not in covered and _metrics(results["results"].get(name, {})):
            covered |= {task.task_name for task in group.get_all_tasks()}
            covered |= {inner.name for inner in group.get_all_groups()}
            yield name
    yield from (name for name in loaded["tasks"] if name not in covered)


def _result(name: str, results: Mapping[str, Any], tasks: Mapping[str, Any], lm: TwofoldLM) -> TaskResult:
    found = results["results"][name]
    metrics = _metrics(found)
    metric, scale = _main_metric(name, metrics)
    score, chosen = metric.split(",")
    leaves = [name] if name in tasks else _leaves(name, results["group_subtasks"])
    samples = [s for leaf in leaves for s in results["samples"][leaf] if s["filter"] == chosen]
    values = tuple(float(s[score]) for s in samples if isinstance(s.get(score), (bool, int, float)))
    is_mean = bool(values) and abs(fmean(values) - metrics[metric]) < 1e-6 * max(1.0, scale)
    error = found.get(f"{score}_stderr,{chosen}")
    usages = {
        (leaf, instance.doc_id, instance.idx): lm.usage(instance.request_type, instance.args, instance.resps)
        for leaf in leaves
        for instance in tasks[leaf].instances
    }
    return TaskResult(
        task=name,
        metric=score if chosen == "none" else metric,
        value=metrics[metric],
        error=float(error) if isinstance(error, (int, float)) else None,
        n=len({(leaf, doc) for leaf, doc, _ in usages}),
        scale=scale,
        higher_is_better=all(tasks[leaf].higher_is_better().get(score, True) for leaf in leaves),
        values=values if is_mean else (),
        others={key.removesuffix(",none"): value for key, value in metrics.items() if key != metric},
        n_truncated=len({(leaf, doc) for (leaf, doc, _), usage in usages.items() if usage.n_cut}),
        source_tokens=fmean(usage.source for usage in usages.values()),
        target_tokens=fmean(usage.target for usage in usages.values()),
    )


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """ "metric,filter" and value."""
    return {
        key: float(value)
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _main_metric(name: str, metrics: Mapping[str, float]) -> tuple[str, float]:
    """Which of the metrics stands for the task, and its best value."""
    names = [key.split(",")[0] for key in metrics]
    scale = 1.0
    wanted = next((metric for metric in _STANDS_FIRST if metric in names), names[0])
    with suppress(ImportError, KeyError, ValueError):  # a task that somebody brought
        from twofold.evaluate.tasks import main_metric

        wanted, scale = main_metric(name)
    key = next((key for key in metrics if wanted in (key, key.split(",")[0])), None)
    if key is None:
        raise ValueError(f"task {name} was to report {wanted}, and has {', '.join(metrics)}")
    return key, scale


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    if name not in subtasks:
        return [name]
    return [leaf for child in subtasks[name] for leaf in _leaves(child, subtasks)]


def _cache_file(folder: Path, contender: Contender, settings: Mapping[str, Any]) -> str:
    """Without its ending, which the harness adds."""
    tokenizer = contender.model.tokenizer
    depends = {
        "format": _CACHE_FORMAT,
        "model": fingerprint(contender.model),
        "vocabulary": sorted(tokenizer.get_vocab().items()) if tokenizer is not None else None,
        "template": getattr(tokenizer, "chat_template", None),
        **settings,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', contender.name)}-{digest}")
