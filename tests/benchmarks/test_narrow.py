"""The narrower donor of the study: all axes kept it is the donor, and axes that nothing uses can go."""

import json

import pytest
import torch
import transformers

import twofold
from benchmarks.study.narrow import narrowed, principal_axes, single_stack, write_llama
from tests.models.hf import donor, gemma2_config, llama_config
from tests.models.tiny import assert_same, differ, random_ids

SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
TEXTS = ["the quick brown fox jumps over the lazy dog", "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144"]


@pytest.fixture
def make(tmp_path, byte_tokenizer):
    """A donor of transformers, and twofold's tied pair of it."""

    def save(config):
        theirs = donor(config)
        theirs.save_pretrained(tmp_path / "donor")
        byte_tokenizer.save_pretrained(tmp_path / "donor")
        return theirs, twofold.adapt(tmp_path / "donor", start="lossless", tie_stacks=True)

    return save


def narrow(pair, width, folder):
    axes = principal_axes(pair, TEXTS)
    weights, stack = narrowed(single_stack(pair), pair.config.encoder, axes, width)
    write_llama(folder, weights, stack, pair.tokenizer, pair)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_with_all_axes_it_is_the_donor(make, tied, tmp_path):
    theirs, pair = make(llama_config(**SIZES, tie_word_embeddings=tied))
    cut = narrow(pair, 32, tmp_path / "cut")
    ids = random_ids(2, 20)
    assert_same(cut(ids).logits, theirs(ids).logits, 1e-4)
    read = twofold.adapt(tmp_path / "cut", start="lossless")
    assert_same(read(ids[:, :9], None, ids[:, 9:]).logits, theirs(ids).logits[:, 9:], 1e-4)
    assert differ(narrow(pair, 28, tmp_path / "less")(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_axes_that_nothing_writes_to_are_cut_for_nothing(make, tmp_path):
    """Embedding and writers reach 20 of 32 directions only; the mean square is still over 32."""
    theirs, pair = make(llama_config(**SIZES))
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 20, generator=generator)).Q
    onto = basis @ basis.T
    inner = theirs.model
    inner.embed_tokens.weight.copy_(inner.embed_tokens.weight @ onto)
    for layer in inner.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(onto @ writer.weight)
    theirs.save_pretrained(tmp_path / "donor")
    pair = twofold.adapt(tmp_path / "donor", start="lossless", tie_stacks=True)
    cut = narrow(pair, 20, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["hidden_size"] == 20
    ids = random_ids(2, 20)
    assert_same(cut(ids).logits, theirs(ids).logits, 1e-4)


def test_what_cannot_be_cut_is_refused(make):
    _, pair = make(llama_config(**SIZES))
    stack, axes = pair.config.encoder, torch.eye(32, dtype=torch.float64)
    with pytest.raises(ValueError, match="between 1 and the donor's 32, got 36"):
        narrowed({}, stack, axes, 36)
    with pytest.raises(ValueError, match="a multiple of the 4 heads as width, got 30"):
        narrowed({}, stack, axes, 30)
    _, gemma = make(gemma2_config(**SIZES))
    with pytest.raises(ValueError, match="only Llama-like stacks can be cut"):
        narrowed({}, gemma.config.encoder, axes, 32)


def test_a_folder_with_a_model_is_left_alone(make, tmp_path):
    _, pair = make(llama_config(**SIZES))
    with pytest.raises(FileExistsError, match="has a model already"):
        narrow(pair, 32, tmp_path / "donor")
