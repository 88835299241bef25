"""Tasks of the harness whose examples come from local files. Importing this needs lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import AggMetricConfig, Group
from lm_eval.api.samplers import get_sampler
from lm_eval.api.task import ConfigurableTask

from twofold.evaluate.tasks.definition import Local, LocalGroup
from twofold.evaluate.tasks.lines import Doc, Docs

_TEST, _SHOTS = "test", "shots"


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task that reads local files; few-shot examples are read when the first prompt wants some.

    Where the examples have no split of their own for that, a question is never among its own few-shot examples.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Read the first example.

        Args:
            config: as for `ConfigurableTask`, and under "local" a dict of `Docs` with "test" and perhaps "shots",
                and under "shots_by" the field that few-shot examples share with the question, or None.
        """
        self._local: dict[str, Docs] = config.pop("local")
        self._shots_by: str | None = config.pop("shots_by")
        self._shots_seed: int | None = None
        config.pop("class", None)
        settings = {
            "dataset_path": None,
            "dataset_name": None,
            "training_split": None,
            "validation_split": None,
            "test_split": _TEST,
            "fewshot_split": _SHOTS if _SHOTS in self._local else _TEST,
        }
        super().__init__(config=config | settings)

    def download(self, *_: Any, **__: Any) -> None:
        """Nothing to fetch."""
        self.dataset = self._local

    def fewshot_docs(self) -> None:
        """None for now: see `sampler`."""

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        """Draw anew."""
        self.fewshot_rnd = Random(seed)
        self._shots_seed = seed
        self.__dict__.pop("sampler", None)

    @cached_property
    def sampler(self) -> Any:
        """Draws from all few-shot examples, by the rule of the task's file."""
        return get_sampler(self.fewshot_cfg.sampler)(list(super().fewshot_docs()), rnd=self._shots_seed)

    def fewshot_context(self, doc: Doc, num_fewshot: int, **settings: Any) -> Any:
        """The prompt; see `ConfigurableTask`."""
        if num_fewshot and self._shots_by is not None:
            self.sampler.replace_df(self._kinds[doc[self._shots_by]])
        return super().fewshot_context(doc, num_fewshot, **settings)

    @cached_property
    def _kinds(self) -> dict[str, list[Doc]]:
        kinds: dict[str, list[Doc]] = {}
        for doc in self.sampler.df:
            kinds.setdefault(doc[self._shots_by], []).append(doc)
        return kinds


def build(name: str, local: Local, data: Path) -> LocalTask:
    """A local task.

    Raises:
        ValueError: the first example is broken, or there is none.
    """
    splits = {_TEST: local.test.docs(data)}
    if local.shots is not None:
        splits[_SHOTS] = local.shots.docs(data)
    config = {**local.config, "local": splits, "shots_by": local.shots_by}
    if local.folder is None:
        return LocalTask({**config, "task": name})
    folder = Path(lm_eval.tasks.__file__).parent / local.folder
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    base = local.base or name
    # A group is the harness's way to take a task file with changes.
    changed = {"group": name, "task": [{**config, "task": base, "class": LocalTask}]}
    task: LocalTask = manager.load(changed)["tasks"][base]
    task.set_config("task", name)
    return task


def group(name: str, local: LocalGroup, members: Sequence[LocalTask]) -> Any:
    """Local tasks under one score."""
    metric, _, kind = local.metric.partition(",")
    made = Group(name, aggregate_metric_list=[AggMetricConfig(metric=metric, filter_list=[kind or "none"])])
    for member in members:
        made.add(member)
    return made
