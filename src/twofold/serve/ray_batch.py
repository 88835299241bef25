"""Lines of a batch on several machines, by Ray Data: a model in each worker, outcomes in the order of the lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twofold.serve.batch import Batches, batch_app
from twofold.serve.batch_files import BatchLine, Outcome
from twofold.serve.opening import EngineOptions

if TYPE_CHECKING:
    import pyarrow as pa

LINES_TOGETHER = 128
"""That go to a worker as one; it begins with the next ones when all of them are answered."""


class BatchWorker:
    """A model that answers lines, for `ray.data.Dataset.map_batches`.

    In: columns `number` (int), `url` and `body` (JSON, see `batch_files`). Out: `status_code` (int), `request_id` and
    `body` (JSON), in the same order.

    Args:
        name: by which lines call the model.
        options: how it is opened. Its folder has to be there on every machine.
        seed: see `batch.seeded`.
    """

    def __init__(self, name: str, options: EngineOptions, seed: int = 0) -> None:
        self._batches = Batches(batch_app(name, options.engine()), seed=seed)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """One batch."""
        lines = [
            BatchLine(number=int(number), url=str(url), body=json.loads(body))
            for number, url, body in zip(rows["number"], rows["url"], rows["body"], strict=True)
        ]
        outcomes = list(self._batches.answer(lines))
        return {
            "status_code": [outcome.status_code for outcome in outcomes],
            "request_id": [outcome.request_id for outcome in outcomes],
            "body": [json.dumps(outcome.body, ensure_ascii=False) for outcome in outcomes],
        }


def answer_on_ray(
    name: str, options: EngineOptions, lines: Iterable[BatchLine], *, n_workers: int, seed: int = 0
) -> Generator[Outcome, None, None]:
    """Outcomes in the order of the lines, from workers on a Ray cluster: the one this process has joined, or that
    RAY_ADDRESS names, or else this machine alone.

    A worker that is lost is started again, and what it had is answered once more. What waits lies in this process and
    in the cluster's object store, so that nobody else has to see the file.

    Args:
        name, options, seed: see `BatchWorker`. Each worker takes `options.threads` CPUs of the cluster, its share if
            there are none, and one GPU where the cluster has any.
        lines: the input.
        n_workers: models that are loaded.

    Raises:
        ImportError: the extra `ray` is missing.
        ValueError: the cluster has too few CPUs or GPUs for so many workers.
    """
    ray = _connected()
    n_cpus, n_gpus = _share(ray.cluster_resources(), options.threads, n_workers)
    known = list(lines)
    answers: Iterator[Mapping[str, Any]] = iter(())
    if tables := list(_tables([line for line in known if line.body is not None])):
        dataset = ray.data.from_arrow(tables)
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        answered = dataset.map_batches(
            BatchWorker,
            fn_constructor_args=(name, replace(options, threads=n_cpus), seed),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=n_workers),
            num_cpus=n_cpus,
            num_gpus=n_gpus,
        )
        answers = iter(answered.iter_rows())
    for line in known:
        if line.body is None:
            yield Outcome(line=line)
            continue
        answer = next(answers)
        yield Outcome(
            line=line,
            status_code=answer["status_code"],
            request_id=answer["request_id"],
            body=json.loads(answer["body"]),
        )


def _share(resources: Mapping[str, float], threads: int | None, n_workers: int) -> tuple[int, int]:
    """CPUs and GPUs of a worker. Raises ValueError where the cluster has too few."""
    n_cpus = threads or max(1, int(resources.get("CPU", 1)) // n_workers)
    n_gpus = 1 if resources.get("GPU") else 0
    for kind, each in (("CPU", n_cpus), ("GPU", n_gpus)):
        if each * n_workers > resources.get(kind, 0):
            raise ValueError(
                f"{n_workers} workers with {each} {kind}s each need {each * n_workers}, the cluster has "
                f"{resources.get(kind, 0):g}; ask for fewer workers or threads, or let machines join the cluster"
            )
    return n_cpus, n_gpus


def _connected() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('several workers need Ray: pip install "twofold[ray]"') from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
    return ray


def _tables(lines: Sequence[BatchLine]) -> Iterator[pa.Table]:
    """What goes to a worker as one."""
    import pyarrow as pa

    for start in range(0, len(lines), LINES_TOGETHER):
        part = lines[start : start + LINES_TOGETHER]
        yield pa.table(
            {
                "number": pa.array([line.number for line in part], pa.int64()),
                "url": [line.url for line in part],
                "body": [json.dumps(line.body, ensure_ascii=False) for line in part],
            }
        )
