"""Adapters: what is trained, what is written, and that PEFT reads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

peft = pytest.importorskip("peft")

from tests.models.tiny import assert_same, build, differ, pair_config, random_ids, stack  # noqa: E402
from tests.train.ranks import on_ranks  # noqa: E402
from tests.train.test_loop import StopAfter, optimizer_tensors  # noqa: E402
from tests.train.tiny_run import TEXTS, loader, recipe, settings, tiny_model  # noqa: E402
from twofold.checkpoint.card import stored_history  # noqa: E402
from twofold.checkpoint.load import load  # noqa: E402
from twofold.checkpoint.save import save  # noqa: E402
from twofold.checkpoint.shards import ShardsSource  # noqa: E402
from twofold.cli.merge import merge_command  # noqa: E402
from twofold.config.adapter import AdapterConfig  # noqa: E402
from twofold.hf import TwofoldForConditionalGeneration  # noqa: E402
from twofold.train import fit, train  # noqa: E402
from twofold.train.adapters import (  # noqa: E402
    adapter_off,
    add_adapter,
    find_targets,
    merge_adapter,
    plain_parameters,
    save_adapter,
)
from twofold.train.checkpointing import save_model  # noqa: E402
from twofold.train.step import LossModule, batch_loss  # noqa: E402
from twofold.train.world import ONE_PROCESS  # noqa: E402

LOSSLESS = {
    "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
    "decoder_start": "last_source_token",
}  # fmt: skip
PAIRS = {
    "separate": {},
    "lossless": LOSSLESS,
    "own-source-projections": LOSSLESS | {"source_projections": "own"},
    "tied-stacks": LOSSLESS | {"tie_stacks": True, "tie_word_embeddings": "all"},
    "head-of-its-own": {"tie_word_embeddings": "none"},
}


def model_of(changes):
    torch.manual_seed(1)  # of biases that `build` leaves as they come
    return build(pair_config(stack(), **changes))


def adapted(changes, **config):
    """A model whose adapter is far from doing nothing."""
    model = model_of(changes)
    add_adapter(model, AdapterConfig(rank=4, **config), seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            noise = torch.randn(p.shape, generator=generator)
            with torch.no_grad():
                p.add_(0.1 * noise)
    return model


def logits(model, **inputs):
    return model(random_ids(2, 6), decoder_input_ids=random_ids(2, 4, seed=1), **inputs).logits


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("changes", PAIRS.values(), ids=PAIRS)
def test_merged_and_read_by_peft_it_is_what_was_trained(changes, kind, tmp_path):
    model = adapted(changes, kind=kind, lm_head=changes.get("tie_word_embeddings") == "none")
    expected = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(model_of(changes)))
    assert differ(expected, logits(model_of(changes)))
    assert torch.equal(logits(model), expected)  # on again

    save_adapter(model, tmp_path / "adapter", ONE_PROCESS)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    hf = TwofoldForConditionalGeneration.of(model_of(changes))
    read = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    assert torch.equal(logits(read), expected)

    save_model(model, tmp_path / "merged", ONE_PROCESS)
    merged = load(tmp_path / "merged")
    assert_same(logits(merged), expected)
    save(model_of(changes), tmp_path / "base")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "by-peft")
    by_peft = load(tmp_path / "by-peft")
    for (_, ours), (_, theirs) in zip(merged.named_parameters(), by_peft.named_parameters(), strict=True):
        assert_same(ours, theirs)
    assert set(plain_parameters(model)) == {name for name, _ in model_of(changes).named_parameters()}


def test_default_targets_are_every_layer_of_both_stacks():
    def found(changes, **config):
        model = model_of(changes)
        targets = find_targets(model, AdapterConfig(**config))
        add_adapter(model, AdapterConfig(**config), seed=0)
        names = {
            n.split(".lora_A")[0].removeprefix("model.")
            for n, _ in model.named_parameters()
            if ".lora_A" in n
        }
        return targets, names

    targets, names = found({})
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(names) == 3 * 7 + 3 * 11
    assert {"encoder.layers.2.mlp.up_proj", "decoder.layers.0.cross_attn.k_proj"} <= names
    targets, names = found(PAIRS["own-source-projections"], targets="attention")
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "source_k_proj", "source_v_proj"]
    assert len(names) == 3 * 4 + 3 * 6
    targets, names = found({}, targets=("cross_attn.q_proj", "decoder.layers.1.mlp.up_proj"))
    assert names == {f"decoder.layers.{i}.cross_attn.q_proj" for i in range(3)} | {
        "decoder.layers.1.mlp.up_proj"
    }


def test_the_seed_decides_what_a_is():
    def a_of(seed):
        torch.rand(seed + 1)  # what was drawn before does not matter
        model = model_of({})
        add_adapter(model, AdapterConfig(), seed=seed)
        return model.model.encoder.layers[0].mlp.up_proj.lora_A["default"].weight

    assert torch.equal(a_of(3), a_of(3))
    assert not torch.equal(a_of(3), a_of(4))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"targets": ("query",)}, "query: no linear layer .* it has down_proj, gate_proj, k_proj"),
        ({}, {"targets": ("out_proj",)}, "a head takes no low-rank adapter"),
        ({}, {"targets": ("embed_tokens",)}, "embed_tokens: no linear layer"),
        ({}, {"lm_head": True}, "tied to its embeddings"),
    ],
)
def test_adapters_that_cannot_be(changes, config, message):
    model = model_of(changes)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, AdapterConfig(**config), seed=0)
    assert all(p.requires_grad for p in model.parameters())


def test_settings_that_go_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"targets must be 'all', 'attention' or names"):
        AdapterConfig(targets=())
    with pytest.raises(ValueError, match="use ema_decay instead"):
        settings(adapter={}, average_last=2, save_every=1)
    with pytest.raises(ValueError, match=r"set adapter\.merge=true"):
        settings(adapter={"merge": False}, opening={"kind": "layers", "steps": 2})
    model = adapted({})
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(model, AdapterConfig(), seed=0)
    ul2 = {"objective": {"name": "ul2", "preset": "t5gemma2"}}
    with pytest.raises(ValueError, match=r"the objective adds \d+ sentinels"):
        train(recipe(tmp_path, adapter={}, data=ul2))
    assert not (tmp_path / "run").exists()


def test_merging_refuses_what_does_not_fit(tmp_path):
    save_adapter(adapted(LOSSLESS), tmp_path / "adapter", ONE_PROCESS)
    save(model_of(LOSSLESS), tmp_path / "base")
    shallow = stack(num_hidden_layers=1, layer_types=("full_attention",))
    save(build(pair_config(shallow, **LOSSLESS)), tmp_path / "shallow")
    save(build(pair_config(stack(hidden_size=24), **LOSSLESS)), tmp_path / "narrow")
    for other in ("shallow", "narrow"):
        with pytest.raises(ValueError, match="does not fit .*/" + other):
            merge_adapter(tmp_path / other, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        merge_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is an adapter, not a model; .*twofold merge BASE"):
        load(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    save_adapter(adapted({}), tmp_path / "adapter", ONE_PROCESS)
    save(model_of({}), tmp_path / "base")
    merge_command(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", overwrite=False, json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(tmp_path / "out")
    assert_same(logits(load(tmp_path / "out")), logits(adapted({})))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_gradient_is_that_of_the_merged_weight(kind):
    """LoRA: dL/dB = s dL/dW A^T, dL/dA = s B^T dL/dW. DoRA: along each row's direction, dL/dm."""
    model = adapted({}, kind=kind, targets=("self_attn.q_proj",))
    layer = model.model.decoder.layers[1].self_attn.q_proj
    target = random_ids(2, 4, seed=2).flatten()
    F.cross_entropy(logits(model).flatten(0, 1), target).backward()
    merged = {name: plain.tensor() for name, plain in plain_parameters(model).items()}
    plain = model_of({})
    plain.load_state_dict(merged, strict=False)
    F.cross_entropy(logits(plain).flatten(0, 1), target).backward()
    slope = plain.model.decoder.layers[1].self_attn.q_proj.weight.grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if kind == "dora":
        weight = layer.base_layer.weight + 8 * b @ a
        length = weight.norm(dim=1, keepdim=True)
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert_same(magnitude.grad, (slope * weight / length).sum(dim=1))
        slope = slope * (magnitude[:, None] / length)  # the length itself passes nothing on, section 4.3
    assert_same(b.grad, 8 * slope @ a.T)  # alpha 32, rank 4
    assert_same(a.grad, 8 * b.T @ slope)


ADAPTER = {"rank": 2, "dropout": 0.1}


@pytest.mark.parametrize(
    "changes", [{"adapter": ADAPTER, "ema_decay": 0.5}, {"adapter": ADAPTER | {"kind": "dora"}}]
)
def test_a_resumed_run_equals_the_run_that_never_stopped(changes, tmp_path):
    whole = train(recipe(tmp_path, steps=4, output=str(tmp_path / "whole"), **changes))
    parts = recipe(tmp_path, steps=4, output=str(tmp_path / "parts"), **changes)
    assert not train(parts, callbacks=[StopAfter(2)]).is_finished
    resumed = train(parts, resume=True)
    assert (whole.losses, whole.held_out) == (resumed.losses, resumed.held_out)
    assert whole.losses[-1] < whole.losses[0]
    for folder in ["adapter", "adapter-ema"] if "ema_decay" in changes else ["adapter"]:
        one, other = (load_file(r.output / folder / "adapter_model.safetensors") for r in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    base, result = load(tmp_path / "start"), load(whole.model_path)
    for (name, before), (_, after) in zip(base.named_parameters(), result.named_parameters(), strict=True):
        assert torch.equal(before, after) == (not name.endswith("proj.weight") or "lm_head" in name), name

    names = set(ShardsSource(whole.checkpoint).names())
    assert names
    assert all(".lora_" in name for name in names)
    assert {name.rpartition(".")[0] for name in optimizer_tensors(whole.checkpoint)} == names
    assert not (whole.checkpoint / "config.json").exists()
    saved = json.loads((whole.output / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "start")
    assert saved["inference_mode"]
    told = [phase.step for phase in load(resumed.model_path).history.phases]
    assert told == [4]  # one phase, though it was resumed


def test_without_merging_the_adapter_is_the_result(tmp_path):
    result = train(recipe(tmp_path, steps=2, adapter={"merge": False}))
    assert result.model_path == tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "model").exists()
    hf = TwofoldForConditionalGeneration.of(load(tmp_path / "start"))
    assert peft.PeftModel.from_pretrained(hf, result.model_path)

    card = (result.model_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "twofold merge BASE FOLDER" in card
    merge_adapter(tmp_path / "start", result.model_path, tmp_path / "merged")
    told = load(tmp_path / "merged").history
    assert told == stored_history(result.model_path)
    assert [phase.step for phase in told.phases] == [2]


def test_memory_savers_and_phases_change_nothing_else(tmp_path):
    """The same losses with blocks computed again in the backward pass; a warm-up trains cross-attention's adapters."""

    def losses(name, dropout=0.0, **changes):
        model = tiny_model()
        config = settings(steps=3, adapter={"rank": 2, "dropout": dropout}, **changes)
        return model, fit(model, loader(model), None, config, tmp_path / name).losses

    _, plain = losses("plain", 0.2)
    for mode in ("full", "selective"):
        assert losses(mode, 0.2, activation_checkpointing=mode)[1] == plain
    model, _ = losses("phases", cross_attention_warmup_steps=3)
    moved = {n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0}
    assert moved
    assert all("cross_attn" in name for name in moved)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
def test_packed_rows_on_every_backend(backend):
    """The loss of packed rows is that of their examples, one by one."""
    model = tiny_model()
    add_adapter(model, AdapterConfig(rank=4), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    objective = LossModule(model)
    model.set_attention_backend("eager")
    short = [text[:9] for text in TEXTS[:4]]
    alone = sum(
        batch_loss(objective, b, torch.device("cpu"))
        for b in loader(model, short, rows_per_batch=1, packing=False).one_pass()
    )
    model.set_attention_backend(backend)
    (packed,) = loader(model, short, rows_per_batch=2).one_pass()
    assert packed.segment_ids.max() > 1
    assert_same(batch_loss(objective, packed, torch.device("cpu")), alone)


def _train(folder):
    result = train(two_rank_recipe(folder, "ranks"))
    return result.losses, result.held_out


def two_rank_recipe(folder, name):
    adapter, samples = {"rank": 2, "kind": "dora"}, {"count": 2, "max_new_tokens": 4}
    return recipe(folder, steps=3, adapter=adapter, samples=samples, output=str(folder / name))


def test_two_ranks_do_what_one_does(tmp_path):
    one = train(two_rank_recipe(tmp_path, "one"))
    for losses, held_out in on_ranks(_train, 2, tmp_path):
        assert losses == pytest.approx(one.losses, rel=3e-6)
        assert [loss for _, loss in held_out] == pytest.approx([loss for _, loss in one.held_out], rel=3e-6)
    assert (tmp_path / "ranks" / "samples.jsonl").read_text() == (one.output / "samples.jsonl").read_text()
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "ranks" / name), load_file(one.output / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
