"""The rollout benchmark: both sides write the same kind of answers, and figures are added up per system."""

from pathlib import Path

import pytest
import torch

from tests.posttrain.tiny_rollouts import grpo_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_transformers_writes_greedily_what_the_engine_writes(text_model):
    """Near temperature 0 there is one answer, so that the comparison is of the same thing."""
    from rollouts import TransformersWriter

    from twofold.config.grpo import RolloutConfig
    from twofold.data import Convention
    from twofold.data.chat import prompt_inputs
    from twofold.posttrain.prompts import Prompt
    from twofold.posttrain.rollouts import RolloutEngine
    from twofold.train.world import ONE_PROCESS

    model = text_model().train()
    convention = Convention.of(model.config)
    prompts = [
        Prompt(
            *prompt_inputs([{"role": "user", "content": text}], model.tokenizer, convention), text, {}, text
        )
        for text in ("one", "a longer one")
    ]
    engine = RolloutEngine(model, RolloutConfig(max_new_tokens=6, num_samples=2), ONE_PROCESS)
    found = []
    for writer in (engine, TransformersWriter(model, 6, torch.float32)):
        writer.refresh()
        found.append(writer.answer(prompts, [1, 2], num_samples=2, temperature=1e-4))
        assert model.training
    assert found[0] == found[1]


def test_every_system_takes_its_steps_in_one_loop(monkeypatch, tmp_path, text_model):
    import rollouts

    model = text_model(reads="final", layout="separate")
    writers = rollouts.writers

    def without_openvino(model, recipe):
        return {
            ("engine" if name == "engine_shared" else name): writer
            for name, writer in writers(model, recipe).items()
            if name != "engine"
        }

    monkeypatch.setattr(rollouts, "writers", without_openvino)
    recipe = grpo_recipe(tmp_path, steps=2, accumulate_batches=1, data={"source_length": 99})
    metrics, details = rollouts.summary(rollouts.compared(model, recipe), recipe)
    assert sum(metrics[f"{phase}_share"] for phase in rollouts.PHASES) == pytest.approx(1, abs=1e-3)
    peers = [metrics[f"transformers_{dtype}_rollouts_per_s"] for dtype in ("float32", "bfloat16")]
    assert metrics["rollout_speedup"] == pytest.approx(
        metrics["engine_rollouts_per_s"] / max(peers), rel=0.01
    )
    assert {len(s) for phases in details["seconds"].values() for s in phases.values()} == {2}
    assert all(2 * 6 < tokens <= 2 * 6 * 6 for tokens in details["tokens"].values())
