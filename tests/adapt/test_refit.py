"""Refitted decoders against least squares over all tokens, layer by layer, on a short decoder that is really run."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

import twofold
from tests.models.hf import gemma2_config, llama_config, qwen2_config
from tests.models.tiny import assert_same, differ
from twofold.adapt import Choices, adapt_to_folder
from twofold.adapt import refit as module
from twofold.adapt.depth import DepthChoice, cut_decoder
from twofold.adapt.refit import refit_decoder

LETTERS = "the quick brown fox jumps over the lazy dog and runs away from it "
TEXTS = {
    "letters": [f"{LETTERS[i:]} {LETTERS * 3}" for i in range(0, 60, 3)],
    "numbers": [" ".join(str((n * n + i) % 97) for n in range(60)) for i in range(20)],
}
SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
LENGTH = 24
KEPT = (0, 1, 3)


def fit(model, layers=KEPT, **settings):
    return refit_decoder(model, layers, TEXTS, **{"tokens": 4000, "length": LENGTH} | settings)


@pytest.fixture
def make(save_donor, byte_tokenizer):
    def save(config):
        folder, _ = save_donor(config)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return save


def rows_of(model):
    """Whole rows, fitted and held out, as the documentation of `token_rows` says: documents in turn, every tenth held
    out, a limit of 4000 tokens in all and 400 for each document."""
    documents = [text for pair in zip(TEXTS["letters"], TEXTS["numbers"], strict=True) for text in pair]
    parts, left = ([], []), 4000
    for i, text in enumerate(documents):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:400]
        for start in range(0, len(ids), LENGTH):
            row = ids[start : start + LENGTH][: max(left, 0)]
            left -= len(row)
            if len(row) == LENGTH:
                parts[i % 10 == 0].append(row)
    return parts


def run(model, rows):
    """Streams of the target tokens, [N, D]: behind the last layer; and what every layer's MLP projection reads, [N, F],
    and adds to the stream it found, [N, D]."""
    ids = torch.tensor(rows)
    half = LENGTH // 2
    caught = {}
    last = model.decoder.norm.register_forward_pre_hook(lambda _, args: caught.update(end=args[0]))
    hooks = [last]
    for i, layer in enumerate(model.decoder.layers):

        def keep(_, args, out, i=i):
            caught[f"read{i}"], caught[f"added{i}"] = args[0], out

        hooks.append(layer.mlp.down_proj.register_forward_hook(keep))
        hooks.append(
            layer.register_forward_pre_hook(lambda _, args, i=i: caught.update({f"stream{i}": args[0]}))
        )
    with torch.no_grad():
        model(ids[:, : half - 1], None, ids[:, half - 1 : -1])
    for hook in hooks:
        hook.remove()
    return {name: x.double().flatten(0, 1) for name, x in caught.items()}


@pytest.mark.parametrize("config", [llama_config, qwen2_config], ids=["llama", "qwen2"])
def test_each_layer_is_the_ridge_regression_behind_the_layers_before_it(config, make):
    model = twofold.adapt(make(config(**SIZES)), encoder_mask="sink")
    found = fit(model)
    fitted, held_out = rows_of(model)
    assert (found.tokens, found.held_out_tokens) == (len(fitted) * 12, len(held_out) * 12)
    whole = [run(model, rows) for rows in (fitted, held_out)]
    cut = cut_decoder(model, KEPT)
    cut.decoder.layers = copy.deepcopy(cut.decoder.layers)
    for place, report in enumerate(found.layers):
        assert report.layer == KEPT[place]
        end = "end" if place == 2 else f"stream{KEPT[place + 1]}"
        wanted = [of_part[end] for of_part in whole]
        short = [run(cut, rows) for rows in (fitted, held_out)]
        after = "end" if place == 2 else f"stream{place + 1}"
        found_there = [of_part[after] - of_part[f"added{place}"] for of_part in short]
        read = [of_part[f"read{place}"] for of_part in short]
        old = cut.decoder.layers[place].mlp.down_proj.weight.detach().double()

        def distance(weight, part=1, wanted=wanted, base=found_there, read=read):
            missed = wanted[part] - base[part] - read[part] @ weight.T
            return (missed.square().sum(-1) / wanted[part].square().sum(-1)).mean().item()

        tried = {None: old}
        root = wanted[0].square().sum(-1, keepdim=True).sqrt()
        a, y = read[0] / root, (wanted[0] - found_there[0]) / root
        for ridge in (
            module.RIDGES if place else ()
        ):  # layer 0 is followed by layer 1 as before: nothing to mend
            penalty = torch.eye(a.shape[1]).double() * (ridge * a.square().sum() / a.shape[1]).sqrt()
            rows, targets = torch.cat([a, penalty]), torch.cat([y, penalty @ old.T])
            tried[ridge] = torch.linalg.lstsq(rows, targets).solution.T
        best = min(tried, key=lambda ridge: distance(tried[ridge]))
        assert report.ridge == best
        assert report.before == pytest.approx(distance(old), rel=1e-3, abs=1e-9)
        assert report.after == pytest.approx(distance(tried[best]), rel=1e-3, abs=1e-9)
        weight = found.weights[f"model.decoder.layers.{place}.mlp.down_proj.weight"]
        assert_same(weight, tried[best].float(), 1e-4)
        with torch.no_grad():
            cut.decoder.layers[place].mlp.down_proj.weight.copy_(weight)
    assert found.layers[1].after < 0.9 * found.layers[1].before


def test_a_whole_decoder_has_nothing_to_mend(make):
    model = twofold.adapt(make(llama_config(**SIZES)), encoder_mask="causal")
    found = fit(model, layers=range(4))
    assert max(layer.before for layer in found.layers) < 1e-10
    for i, layer in enumerate(model.decoder.layers):
        assert_same(
            found.weights[f"model.decoder.layers.{i}.mlp.down_proj.weight"], layer.mlp.down_proj.weight
        )


def test_a_short_pair_comes_mended_in_memory_and_on_disk(make, tmp_path):
    folder = make(llama_config(**SIZES))
    asked = {"encoder_mask": "sink", "decoder_depth": 3}

    def choose(model, keep):
        return DepthChoice(KEPT, {"x": 1.0}, ())

    model = twofold.adapt(folder, **asked, choose=choose, refit=fit)
    plain = twofold.adapt(folder, **asked, choose=choose, refit=None)
    name = "model.decoder.layers.1.mlp.down_proj.weight"
    assert differ(model.get_parameter(name), plain.get_parameter(name))
    report = model.adaptation["tensors"][name]
    assert (report["rule"], report["source"]) == ("refit", "model.layers.1.mlp.down_proj.weight")
    assert [layer["layer"] for layer in model.adaptation["refit"]["layers"]] == list(KEPT)
    assert "refit" not in plain.adaptation
    rows = torch.tensor(rows_of(model)[1])
    with torch.no_grad():
        donor = twofold.adapt(folder, encoder_mask="sink")
        inputs = rows[:, :11], None, rows[:, 11:-1]
        wanted = donor(*inputs).logits.softmax(-1)
        logits = (m(*inputs).logits for m in (model, plain))
        far = [F.kl_div(x.log_softmax(-1), wanted, reduction="batchmean").item() for x in logits]
    assert far[0] < 0.8 * far[1]
    adapt_to_folder(folder, None, tmp_path / "out", Choices(**asked), choose=choose, refit=fit)
    loaded = twofold.load(tmp_path / "out")
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert json.loads((tmp_path / "out" / "adaptation.json").read_text())["tensors"][name]["rule"] == "refit"


def test_refusals(make):
    gemma = make(gemma2_config(**SIZES))
    model = twofold.adapt(gemma, encoder_mask="causal")
    with pytest.raises(ValueError, match=r"got layout='merged', post_norms=True.*Train"):
        fit(model)
    short = twofold.adapt(
        gemma, encoder_mask="causal", decoder_depth=2, choose=lambda *_: DepthChoice((0, 3), {}, ())
    )
    assert "refit" not in short.adaptation  # Gemma goes without


def test_texts_that_are_too_short_are_refused(make):
    model = twofold.adapt(make(llama_config(**SIZES)), encoder_mask="causal")
    with pytest.raises(ValueError, match=r"no document has 24 tokens"):
        refit_decoder(model, KEPT, {"short": ["hello", "world"]}, tokens=100, length=LENGTH)
    assert not [hook for block in model.decoder.layers for hook in block._forward_pre_hooks]
