"""PEFT on a pair: LoRA without target modules, trained, saved, loaded, merged."""

import pytest
import torch

peft = pytest.importorskip("peft")

from tests.models.tiny import assert_same, build, differ, pair_config, random_ids, stack  # noqa: E402
from twofold.hf import TwofoldForConditionalGeneration  # noqa: E402

LOSSLESS = {
    "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
    "decoder_start": "last_source_token",
}  # fmt: skip
PAIRS = {
    "separate": ({}, 3 * 4 + 3 * 8),
    "lossless": (LOSSLESS, 6 * 4),
    "own-source-projections": (LOSSLESS | {"source_projections": "own"}, 3 * 4 + 3 * 6),
    "tied-stacks": (LOSSLESS | {"tie_stacks": True, "tie_word_embeddings": "all"}, 3 * 4),
}
"""Pairs, and the linear layers that are adapted in each."""


def model_of(changes):
    torch.manual_seed(1)  # of the biases of projections for the source
    return TwofoldForConditionalGeneration.of(build(pair_config(stack(), **changes)))


@pytest.mark.parametrize(("changes", "n_adapted"), PAIRS.values(), ids=PAIRS)
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_training_an_adapter(changes, n_adapted, tmp_path):
    base = model_of(changes)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    ids, labels = random_ids(2, 6), random_ids(2, 4, seed=1)
    untouched = base(ids, labels=labels)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_dropout=0.0)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    names = {name.split(".base_layer")[0] for name, _ in model.named_modules() if name.endswith("base_layer")}
    assert len(names) == n_adapted
    if not changes:
        assert {name.split(".")[-2] for name in names} == {"self_attn", "cross_attn"}
    assert_same(model(ids, labels=labels).logits, untouched.logits)

    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    model.eval()
    adapted = model(ids, labels=labels).logits
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in before:
            assert torch.equal(parameter, before[plain]), name
    with model.disable_adapter():
        assert torch.equal(model(ids, labels=labels).logits, untouched.logits)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model_of(changes), tmp_path / "adapter")
    assert torch.equal(again(ids, labels=labels).logits, adapted)
    assert again.generate(input_ids=ids, max_new_tokens=5).shape[0] == 2
    merged = again.merge_and_unload()
    assert_same(merged(ids, labels=labels).logits, adapted)
    assert differ(adapted, untouched.logits)
    merged.save_pretrained(tmp_path / "merged")
    loaded = TwofoldForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert_same(loaded(ids, labels=labels).logits, adapted)


def test_a_head_that_is_trained_whole():
    """`modules_to_save` puts a wrapper in the head's place."""
    model = peft.get_peft_model(
        model_of({"tie_word_embeddings": "none"}), peft.LoraConfig(modules_to_save=["lm_head"])
    )
    loss = model(random_ids(1, 4), labels=random_ids(1, 3)).loss
    loss.backward()
    (gradient,) = [p.grad for name, p in model.named_parameters() if "modules_to_save" in name]
    assert gradient.abs().sum() > 0
