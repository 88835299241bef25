"""Donor folders: tiny transformers models, saved as users have them, with or without a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from tests.models.hf import donor


@pytest.fixture
def save_donor(tmp_path: Path) -> Callable[..., tuple[Path, nn.Module]]:
    """Saves a random donor and returns its folder and the transformers model."""

    def save(config: transformers.PreTrainedConfig, name: str = "donor", seed: int = 0) -> tuple[Path, Any]:
        model = donor(config, seed)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save
