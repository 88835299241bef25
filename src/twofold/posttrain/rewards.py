"""What says how good completions are: named rewards, each with its weight, added up.

R: completions.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twofold.config.rewards import (
    CodeReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    MathReward,
    RewardConfig,
    RewardModelReward,
    RougeReward,
)
from twofold.data.chat import Messages
from twofold.data.sources import BadRecord, Record
from twofold.evaluate.tasks import scoring
from twofold.posttrain.prompts import Prompt
from twofold.posttrain.reward import load_reward_model
from twofold.posttrain.sandbox import Limits, passes

RewardFunction = Callable[[Sequence[str | Messages], Sequence[str], Sequence[Record]], Sequence[float]]
"""Prompts, completions and records, as many of each, to as many numbers."""

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?%?")
_FENCED = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class RewardError(RuntimeError):
    """A reward failed, or gave something that is no reward; says for which record."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of R completions."""

    total: npt.NDArray[np.float64]
    """[R]: the sum over rewards, each times its weight."""

    by_name: dict[str, npt.NDArray[np.float64]]
    """[R] each, without weights."""


class Rewards:
    """All rewards of a run.

    Attributes:
        names: of each, for metrics.
        columns: what they read of a record.
    """

    def __init__(self, configs: Sequence[RewardConfig], device: torch.device | str = "cpu") -> None:
        """Load what they need.

        Args:
            device: of reward models.

        Raises:
            FileNotFoundError: no such file or reward model.
            ValueError: a path that holds no function, or no reward model.
            ImportError: a package is missing; names the extra.
        """
        self._configs = tuple(configs)
        self._functions = [_make(config, device) for config in configs]
        self.names = tuple(config.label for config in configs)
        self.columns = tuple(dict.fromkeys(name for config in configs for name in config.columns))

    def check(self, record: Record, where: str) -> None:
        """Refuse a record that a reward could not use.

        Raises:
            BadRecord: says where and why.
        """
        for config in self._configs:
            for name in config.columns:
                _check_column(config, record[name], name, where)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Rewards of completions, each to its prompt.

        Raises:
            RewardError: a reward raised, or gave not as many finite numbers as there are completions.
        """
        texts, records = [p.prompt for p in prompts], [p.record for p in prompts]
        by_name: dict[str, npt.NDArray[np.float64]] = {}
        total = np.zeros(len(completions))
        for config, function in zip(self._configs, self._functions, strict=True):
            try:
                found = function(texts, completions, records)
            except Exception as error:
                raise RewardError(f"reward {config.label!r} {_failed(error, prompts)}") from error
            by_name[config.label] = _as_rewards(config.label, found, prompts)
            total += config.weight * by_name[config.label]
        return Scores(total, by_name)


@dataclass(frozen=True, slots=True)
class _EachAlone:
    """A reward of one completion and what its record says, for all of them."""

    score: Callable[[str, Any], float]
    field: str | None = None
    """The column that the record gives."""

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str], records: Sequence[Record]
    ) -> list[float]:
        found = []
        for number, (completion, record) in enumerate(zip(completions, records, strict=True)):
            try:
                found.append(self.score(completion, None if self.field is None else record[self.field]))
            except Exception as error:
                raise _ForOne(number) from error
        return found


class _ForOne(Exception):
    """A reward failed for the completion of this number; its cause says why."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _failed(error: Exception, prompts: Sequence[Prompt]) -> str:
    if isinstance(error, _ForOne):
        cause = error.__cause__
        return f"failed for an answer to {prompts[error.number].where}: {type(cause).__name__}: {cause}"
    places = list(dict.fromkeys(prompt.where for prompt in prompts))
    of = places[0] if len(places) == 1 else f"{places[0]} to {places[-1]} ({len(places)} prompts)"
    return f"failed for answers to {of}: {type(error).__name__}: {error}"


def _as_rewards(name: str, found: Any, prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
    """Float64 [R], or a `RewardError`."""
    values = found.tolist() if isinstance(found, (np.ndarray, torch.Tensor)) else found
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
        raise RewardError(
            f"reward {name!r} must give a list of one number for each of {len(prompts)} completions, got {got} "
            f"(answers to {prompts[0].where} and after)"
        )
    for value, prompt in zip(values, prompts, strict=True):
        is_number = isinstance(value, (int, float, np.number)) and isfinite(value)
        if not is_number:
            raise RewardError(
                f"reward {name!r} must give finite numbers, got {value!r} for an answer to {prompt.where}"
            )
    return np.asarray(values, dtype=np.float64)


def _make(config: RewardConfig, device: torch.device | str) -> RewardFunction:
    match config:
        case MathReward():
            _need("math_verify", "math-verify")
            return _EachAlone(math_reward, config.field)
        case ExactMatchReward():
            return _EachAlone(lambda text, answers: scoring.squad_exact(text, _texts(answers)), config.field)
        case FormatReward():
            return _EachAlone(partial(_matches, re.compile(config.pattern, re.DOTALL), config.whole))
        case RougeReward():
            _need("rouge_score", "rouge-score")
            return _EachAlone(partial(_rouge, config.variant), config.field)
        case LengthReward():
            return _EachAlone(partial(_length, config.target_words))
        case RewardModelReward():
            return _model_reward(config, device)
        case FunctionReward():
            return load_function(config.path)
        case CodeReward():
            limits = Limits(time_s=config.time_s, memory_mb=config.memory_mb)
            return _EachAlone(partial(_code, limits), config.field)


def math_reward(completion: str, answer: Any) -> float:
    """1 if the result of the completion has the value of the answer's, else 0; see `MathReward`."""
    return scoring.math_equal(_final(completion), _final(_text(answer)))


def _final(text: str) -> str:
    """What follows the last "####", which closes a solution in GSM8K (arXiv 2110.14168); else all."""
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if mark else text


def _matches(pattern: re.Pattern[str], whole: bool, completion: str, _: Any) -> float:
    return float((pattern.fullmatch if whole else pattern.search)(completion) is not None)


def _rouge(variant: str, completion: str, references: Any) -> float:
    return scoring.rouge(completion, _texts(references))[variant] / 100


def _length(target_words: int, completion: str, _: Any) -> float:
    over = len(completion.split()) - target_words
    return 0.0 - min(max(over / target_words, 0.0), 1.0)  # not -0.0, which is odd to read


def _code(limits: Limits, completion: str, tests: Any) -> float:
    code, each = code_of(completion), _texts(tests)
    return sum(passes(code, test, limits) for test in each) / len(each)


def code_of(completion: str) -> str:
    """The last fenced block of a completion, or all of it where there is none."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _model_reward(config: RewardModelReward, device: torch.device | str) -> RewardFunction:
    model = load_reward_model(config.path, device=device)

    def score(
        prompts: Sequence[str | Messages], completions: Sequence[str], records: Sequence[Record]
    ) -> list[float]:
        has_text = [n for n, completion in enumerate(completions) if completion.strip()]
        found = [config.of_empty] * len(completions)
        told = model.score([prompts[n] for n in has_text], [completions[n] for n in has_text])
        for n, value in zip(has_text, told.tolist(), strict=True):
            found[n] = value
        return found

    return score


def load_function(path: str) -> RewardFunction:
    """A function out of a Python file, `file.py:name`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no such function, or fails.
    """
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file!r} for the reward function {path!r}; check its path")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"{file} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    function: RewardFunction = found
    return function


def _check_column(config: RewardConfig, value: Any, name: str, where: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) or _is_texts(value)):
        raise BadRecord(
            "wrong type",
            f"{where}: reward {config.label!r} reads {name!r}, which must be a text, a number or a list of texts, got "
            f"{type(value).__name__}",
        )
    if not any(text.strip() for text in _texts(value)):
        raise BadRecord(f"empty {name}", f"{where}: reward {config.label!r} needs {name!r}, and it is empty")
    if isinstance(config, MathReward) and not _has_result(value):
        raise BadRecord(
            f"no result in {name}",
            f"{where}: reward {config.label!r} finds no number or expression in {name!r}: {str(value)[-60:]!r}",
        )


def _has_result(answer: Any) -> bool:
    text = _final(_text(answer)).strip()
    if _NUMBER.fullmatch(text):  # most are, and parsing takes milliseconds
        return True
    import math_verify

    return bool(math_verify.parse(text))


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)


def _texts(value: Any) -> list[str]:
    return list(value) if _is_texts(value) else [str(value)]


def _text(value: Any) -> str:
    return "\n".join(_texts(value))


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"this reward needs the package {package}: pip install 'twofold[eval]'")
