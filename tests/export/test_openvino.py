"""OpenVINO exports run by OpenVINO: logits through the states, padding, rows that move, quantised weights."""

import ast
import builtins
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ov = pytest.importorskip("openvino")

import numpy as np  # noqa: E402

from tests.models.tiny import (  # noqa: E402
    MEETINGS,
    assert_same,
    build,
    differ,
    gemma_stack,
    meeting_id,
    padded,
    pair_config,
    random_ids,
    stack,
)
from twofold.config import RopeConfig  # noqa: E402
from twofold.export import export  # noqa: E402
from twofold.export.export import TOLERANCE  # noqa: E402
from twofold.infer import generate  # noqa: E402
from twofold.models import EncoderDecoder  # noqa: E402

MASKS = {"encoder_mask": ("sink", "bidirectional", "causal")}
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
DOCS = Path(__file__).parents[2] / "docs" / "exports.md"

every_meeting = pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)


class Folder:
    """What was written, run as the docs say."""

    def __init__(self, path: Path) -> None:
        core = ov.Core()
        self.encoder, self.decoder = (
            core.compile_model(path / f"openvino_{name}_model.xml", "CPU", EXACT).create_infer_request()
            for name in ("encoder", "decoder")
        )

    def read(self, ids, mask) -> None:
        self.decoder.reset_state()
        given = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
        read = self.encoder.infer(given).to_dict()
        self.source = {output.get_any_name(): value.copy() for output, value in read.items()}
        self.source["encoder_attention_mask"] = mask.long().numpy()

    def step(self, ids, mask, rows=None):
        """`mask`: of all decoder tokens so far; `rows`: beam_idx, each its own by default."""
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": mask.long().numpy(),
            "beam_idx": np.array(rows or range(len(ids)), np.int32),
        }
        return torch.from_numpy(self.decoder.infer(self.source | given)["logits"].copy())


def exported(pair, path, **options):
    found = export(pair, path, to="openvino", **options)
    assert found.difference < TOLERANCE
    return Folder(path)


@torch.no_grad()
@every_meeting
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_through_the_states(meeting, side, tmp_path):
    """Rows of unequal length, padded on either side, one source empty; windows of 3 that bind; calls of several tokens
    and of one."""
    pair = build(pair_config(gemma_stack(), **MASKS, **meeting), qk_factor=2.0)
    folder = exported(pair, tmp_path / "out")
    ids, mask = padded(random_ids(4, 9), [9, 4, 0, 1], side)
    targets, target_mask = padded(random_ids(4, 10, seed=1), [6, 10, 8, 7], "left")
    real = target_mask[..., None]
    expected = pair(ids, mask, targets, target_mask).logits * real
    for edges in ([0, 10], [0, 5, 6, 7, 8, 9, 10], [0, 4, 7, 10]):
        folder.read(ids, mask)
        found = [folder.step(targets[:, a:b], target_mask[:, :b]) for a, b in itertools.pairwise(edges)]
        assert_same(torch.cat(found, dim=1) * real, expected)


@torch.no_grad()
@pytest.mark.parametrize("meeting", [MEETINGS[i] for i in (0, 5, 8, 15)], ids=meeting_id)
def test_rows_of_one_source_move_and_leave(meeting, tmp_path):
    """As beams do: one row of the source for all."""
    pair = build(pair_config(gemma_stack(), **meeting), qk_factor=2.0)
    folder = exported(pair, tmp_path / "out")
    ids = random_ids(1, 7)
    folder.read(ids, torch.ones_like(ids))
    texts = [[2], [2], [2]]
    for parents in ([0, 1, 2], [2, 0, 0], [1, 1, 2], [2, 0], [0, 1], [1]):
        texts = [texts[parent] for parent in parents]
        newest = torch.tensor([[text[-1]] for text in texts])
        logits = folder.step(newest, torch.ones(len(texts), len(texts[0])), parents)[:, 0]
        for row, text in enumerate(texts):
            assert_same(logits[row], pair(ids, None, torch.tensor([text])).logits[0, -1])
        texts = [[*text, 5 + 3 * row + len(text)] for row, text in enumerate(texts)]


LLAMA3 = RopeConfig(
    theta=50.0, scaling="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
KINDS = {
    "llama": (stack(), {}),
    "biases": (stack(qkv_bias=True, output_bias=True, mlp_bias=True, hidden_activation="gelu"), {}),
    "all-heads": (gemma_stack(num_key_value_heads=4), {}),
    "one-head": (stack(num_key_value_heads=1, qk_norm=True), {"layout": "merged"}),
    "window-in-total": (stack(bidirectional_window="total", sliding_window=4), {}),
    "rope-llama3": (
        stack(rope={"full_attention": LLAMA3, "sliding_attention": RopeConfig(theta=100.0)}),
        {"cross_rope": True},
    ),
    "eoi": (gemma_stack(), {"eoi_token_id": 7, "tie_word_embeddings": "all", "source_bos": True}),
    "tied-stacks": (stack(), {"layout": "merged", "tie_word_embeddings": "all", "tie_stacks": True}),
    "untied": (stack(), {"tie_word_embeddings": "none", "decoder_start": "last_source_token"}),
}


@torch.no_grad()
@pytest.mark.parametrize(("one", "changes"), KINDS.values(), ids=KINDS)
def test_every_kind_of_stack(one, changes, tmp_path):
    pair = build(pair_config(one, **changes))
    folder = exported(pair, tmp_path / "out")
    ids = torch.cat([torch.tensor([[7], [7]]), random_ids(2, 6)], dim=1)
    folder.read(ids, torch.ones_like(ids))
    assert_same(folder.step(ids, torch.ones_like(ids)), pair(ids, None, ids).logits)


@pytest.mark.parametrize("changes", [{}, {"layout": "merged", "source_projections": "own"}])
def test_unequal_sides(changes, tmp_path):
    encoder = stack(hidden_size=48, num_hidden_layers=2, layer_types=("full_attention",) * 2, head_dim=4)
    exported(build(pair_config(encoder, gemma_stack(), **changes)), tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_limited_share_of_what_later_tokens_get(softcap, share, tmp_path):
    one = stack(attn_logit_softcapping=softcap)
    pair = build(pair_config(one, layout="merged", **MASKS))
    ids, mask = padded(random_ids(3, 9), [9, 5, 2], "right")
    targets = random_ids(3, 4, seed=1)
    free = pair(ids, mask, targets).logits
    pair.set_encoder_mask(("sink", "bidirectional", "causal"), future_share=share)
    folder = exported(pair, tmp_path / "out")
    folder.read(ids, mask)
    found = folder.step(targets, torch.ones_like(targets))
    assert_same(
        found, pair(ids, mask, targets).logits, 5e-5
    )  # it divides by what may be small: rounding grows
    assert share > 0.1 or differ(free, found)


def test_quantised_weights(tmp_path):
    pair = EncoderDecoder(pair_config(stack(hidden_size=64, vocab_size=400))).eval()
    pair.initialise_randomly(0)
    sizes, differences = {}, {}
    for name in (None, "int8", "int4"):
        path = tmp_path / str(name)
        found = export(pair, path, to="openvino", quantization=name)
        assert found.difference < TOLERANCE
        differences[name] = found.difference_rounded
        sizes[name] = sum(file.stat().st_size for file in path.glob("*.bin"))
        assert json.loads((path / "precision.json").read_text())["matrices"] == (name or "float32")
    assert differences[None] is None
    assert 1e-4 < differences["int8"] < 0.02 < differences["int4"] < 0.3
    assert sizes["int4"] < sizes["int8"] < 0.4 * sizes[None]
    with pytest.raises(ValueError, match="must be int8 or int4, got 'float16'; leave it out"):
        export(pair, tmp_path / "other", to="openvino", quantization="float16")
    assert not (tmp_path / "other").exists()


def test_a_bfloat16_model_is_written_in_float32(tmp_path):
    pair = build(pair_config(gemma_stack())).bfloat16()
    exported(pair, tmp_path / "out")
    assert pair.lm_head.out_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("start", ["bos", "last_source_token"])
@pytest.mark.parametrize("source_bos", [False, True])
def test_the_docs_example(start, source_bos, text_model, tmp_path):
    """In a process of its own, in which twofold and torch cannot be imported."""
    pair = text_model(decoder_start=start, source_bos=source_bos)
    exported(pair, tmp_path / "pair-ov")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "openvino" in block
    )
    hidden = "import sys\nsys.modules |= dict.fromkeys(('twofold', 'torch', 'transformers', 'numba'))\n"
    code = hidden + code.replace("print(", "print(answers)\nprint(")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers, texts = (ast.literal_eval(line) for line in done.stdout.splitlines())
    sources, prefixes = [], []
    for text in ("What is a dictionary?", "Name a colour."):
        ids = [256] * source_bos + pair.tokenizer(text)["input_ids"]
        prefixes.append([ids.pop()] if start == "last_source_token" else [256])
        sources.append(ids)
    expected = generate(pair, sources, prefixes, max_new_tokens=32, stop_token_ids=())
    assert answers == [list(row.token_ids) for row in expected]
    cut = [answer[: answer.index(257)] if 257 in answer else answer for answer in answers]
    assert texts == [pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]


def test_files(text_model, tmp_path):
    pair = text_model()
    exported(pair, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "openvino_decoder_model.bin",
        "openvino_decoder_model.xml", "openvino_encoder_model.bin", "openvino_encoder_model.xml", "precision.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    tokens = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokens == {"bos_token_id": 256, "eos_token_id": [257], "pad_token_id": 257}
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        export(pair, tmp_path / "out", to="openvino")


def test_a_wrong_weight_is_found(tmp_path, monkeypatch):
    from twofold.export import openvino as target

    real = target._save

    def wrong(pair, folder, weights):
        with torch.no_grad():
            pair.encoder.layers[1].mlp.gate_proj.weight.mul_(1.01)
            real(pair, folder, weights)
            pair.encoder.layers[1].mlp.gate_proj.weight.div_(1.01)

    monkeypatch.setattr(target, "_save", wrong)
    with pytest.raises(ValueError, match="the openvino export differs"):
        export(build(pair_config(stack())), tmp_path / "out", to="openvino")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_file_that_begins_sources_otherwise_is_found(text_model, tmp_path, monkeypatch):
    from twofold.export import openvino as target

    monkeypatch.setattr(target, "for_sources", lambda tokenizer, config: tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer.json makes .* the pair wants \[256, "):
        export(text_model(source_bos=True), tmp_path / "out", to="openvino")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'twofold\[cpu\]'"):
        export(build(pair_config(stack())), tmp_path / "out", to="openvino")
    assert list(tmp_path.iterdir()) == []


def test_numba_is_not_needed(tmp_path):
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from tests.models.tiny import build, pair_config, stack\n"
        "from twofold.export import export\n"
        f"export(build(pair_config(stack())), {str(tmp_path / 'out')!r}, to='openvino')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCS.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
