"""From names to tasks: of local files where they serve one, else of the harness's registry."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from twofold.evaluate.tasks.definition import Local, LocalGroup
from twofold.evaluate.tasks.local import LOCAL
from twofold.evaluate.tasks.suites import SUITES

logger = logging.getLogger(__name__)

EVERYTHING_LOCAL = "local"
"""In place of a name: all that the data folder serves."""


def resolve(names: Sequence[str], data: Path | None = None) -> list[Any]:
    """The harness's task and group objects, which `lm_eval.simple_evaluate` takes.

    Args:
        names: tasks, groups and tags of the harness, local tasks, suites (see `SUITES`), "local" for all that the
            folder serves, and paths of the harness's task files (`.yaml`). What is named twice is taken once.
        data: a folder of local files; a task that it serves is read from there.

    Raises:
        ValueError: an unknown name, a folder or file that does not exist, a broken example; or the hub is needed and
            cannot be reached.
        ImportError: lm-eval, or a package that a task needs, is missing.
    """
    if data is not None and not data.is_dir():
        raise ValueError(f"the data folder {data} does not exist; give one that does, or none to use the hub")
    wanted: dict[str, int | None] = {}
    for name in names:
        for task, shots in _expanded(name, data).items():
            wanted.setdefault(task, shots)
    _import_lm_eval()
    found: list[Any] = []
    for name, shots in wanted.items():
        for item in _build(name, data):
            if shots is not None:
                for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
                    task.set_config("num_fewshot", shots)
            found.append(item)
    return found


def main_metric(name: str) -> tuple[str, float]:
    """The metric that stands for a task, and its best value: 1 or 100.

    The metric is as the harness writes it, with its filter where there is one: `acc_norm`,
    `exact_match,strict-match`. Where less is better (perplexity, bits), the value is 1.

    Raises:
        ValueError: a name that `LOCAL` does not have.
    """
    if name not in LOCAL:
        raise ValueError(f"no metric is known to stand for {name!r}, only for {', '.join(LOCAL)}")
    return LOCAL[name].metric, LOCAL[name].scale


def _expanded(name: str, data: Path | None) -> dict[str, int | None]:
    if name in SUITES:
        return SUITES[name]
    if name != EVERYTHING_LOCAL:
        return {name: None}
    if data is None:
        raise ValueError(
            f"{EVERYTHING_LOCAL!r} names the tasks of a data folder, and there is none; give one"
        )
    members = {
        member for local in LOCAL.values() if isinstance(local, LocalGroup) for member in local.members
    }
    served = dict.fromkeys(task for task in LOCAL if task not in members and not _missing(task, data))
    if not served:
        raise ValueError(f"the data folder {data} serves no task; it could serve {', '.join(LOCAL)}")
    return served


def _missing(name: str, data: Path) -> list[Path]:
    local = LOCAL[name]
    if isinstance(local, LocalGroup):
        return [file for member in local.members for file in _missing(member, data)]
    return [data / file for file in local.files if not (data / file).is_file()]


def _build(name: str, data: Path | None) -> list[Any]:
    if Path(name).suffix in (".yaml", ".yml"):
        return _from_file(Path(name))
    if name in LOCAL and data is not None:
        missing = _missing(name, data)
        if not missing:
            return [_local(name, data)]
        if name not in _registry().task_index:
            raise ValueError(f"task {name!r} reads {', '.join(map(str, missing))}, which does not exist")
        logger.warning("task %s: %s does not exist; the hub is used", name, missing[0])
    return _from_registry(name)


def _local(name: str, data: Path) -> Any:
    from twofold.evaluate.tasks.local_task import build, group

    local = LOCAL[name]
    if isinstance(local, Local):
        return build(name, local, data)
    return group(name, local, [_local(member, data) for member in local.members])


def _from_file(file: Path) -> list[Any]:
    from lm_eval.tasks import TaskManager

    if not file.is_file():
        raise ValueError(f"the task file {file} does not exist")
    return _loaded(TaskManager(include_defaults=False), str(file))


def _from_registry(name: str) -> list[Any]:
    if name not in _registry().task_index:
        if name in LOCAL:
            raise ValueError(f"task {name!r} reads local files; give their folder as data")
        known = [*_registry().task_index, *LOCAL, *SUITES]
        close = difflib.get_close_matches(name, known, n=5)
        raise ValueError(
            f"no task is named {name!r}; {'close are ' + ', '.join(close) if close else 'nothing is close'}. Local "
            f"files can serve {', '.join(LOCAL)}; suites are {', '.join(SUITES)}; a path ends with .yaml"
        )
    return _loaded(_registry(), name)


def _loaded(manager: Any, name: str) -> list[Any]:
    try:
        loaded = manager.load([name])
    except OSError as error:
        raise ValueError(
            f"task {name!r} needs its data set from the Hugging Face hub, which failed ({error}); local files can "
            f"serve {', '.join(LOCAL)}"
        ) from error
    if name in loaded["groups"]:
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


@cache
def _registry() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _import_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError('evaluation needs the package lm-eval: pip install "twofold[eval]"') from error
