"""The wrapper against the pair it wraps: logits, loss, files, vocabulary, gradients."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

import twofold
from tests.models.tiny import (
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
from twofold.hf import TwofoldConfig, TwofoldForConditionalGeneration

LOSSLESS = {
    "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
    "decoder_start": "last_source_token",
}  # fmt: skip
PAIRS = {
    "t5gemma": {},
    "one-table": {"tie_word_embeddings": "all"},
    "untied": {"tie_word_embeddings": "none"},
    "lossless": LOSSLESS,
    "tied-stacks": LOSSLESS | {"tie_stacks": True, "tie_word_embeddings": "all"},
    "tied-stacks-own-head": LOSSLESS | {"tie_stacks": True, "tie_word_embeddings": "none"},
    "eoi": {"layout": "merged", "tie_word_embeddings": "all", "eoi_token_id": 7},
}


def wrapped(one=None, **changes) -> TwofoldForConditionalGeneration:
    return TwofoldForConditionalGeneration.of(build(pair_config(one or stack(), **changes)))


@torch.no_grad()
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_batches(meeting, side):
    model = wrapped(gemma_stack(), **meeting)
    ids, mask = padded(random_ids(2, 9), [9, 6], side)
    targets = random_ids(2, 5, seed=1)
    ours = model.pair(ids, mask, targets, torch.ones_like(targets)).logits
    assert_same(model(ids, mask.long(), targets).logits, ours)
    read = model.get_encoder()(ids, mask)
    assert_same(model(encoder_outputs=read, decoder_input_ids=targets).logits, ours)
    assert_same(model(ids, mask, targets, logits_to_keep=2).logits, ours[:, -2:])


@torch.no_grad()
def test_a_cache_is_extended():
    model = wrapped(gemma_stack(), **LOSSLESS)
    ids, targets = random_ids(2, 6), random_ids(2, 7, seed=1)
    whole = model(ids, decoder_input_ids=targets).logits
    first = model(ids, decoder_input_ids=targets[:, :4])
    assert first.past_key_values.get_seq_length() == 4
    rest = model(ids, decoder_input_ids=targets[:, 4:], past_key_values=first.past_key_values)
    assert_same(rest.logits, whole[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_a_pair_that_starts_from_the_last_source_token(side):
    """[5 6 7 | 8 9 1] and [3 4 | 6 1]: the decoder reads 7 8 9 and 4 6, and predicts 8 9 1 and 6 1."""
    model = wrapped(**LOSSLESS)
    ids, mask = padded(torch.tensor([[5, 6, 7], [3, 4, 0]]), [3, 2], side)
    labels = torch.tensor([[8, 9, 1], [6, 1, -100]])
    output = model(ids, mask, labels=labels)
    total = torch.zeros(())
    for source, decoder, target in (([5, 6], [7, 8, 9], [8, 9, 1]), ([3], [4, 6], [6, 1])):
        tensors = (torch.tensor([source]), None, torch.tensor([decoder]))
        logits = model.pair(*tensors, torch.ones(1, len(decoder))).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(target), reduction="sum")
    assert output.loss.item() == pytest.approx(total.item() / 5, rel=1e-5)
    given = model(ids, mask, labels=labels, num_items_in_batch=10)
    assert given.loss.item() == pytest.approx(total.item() / 10, rel=1e-5)


@torch.no_grad()
def test_labels_of_a_pair_that_starts_from_bos():
    model = wrapped()
    ids, labels = random_ids(1, 4), torch.tensor([[8, 9, 1]])
    logits = model.pair(ids, None, torch.tensor([[2, 8, 9]])).logits[0]
    assert model(ids, labels=labels).loss.item() == pytest.approx(
        F.cross_entropy(logits, labels[0]).item(), rel=1e-5
    )
    as_tuple = model(ids, labels=labels, return_dict=False)
    assert [len(as_tuple), as_tuple[1].shape] == [3, (1, 3, 40)]


@torch.no_grad()
@pytest.mark.parametrize("changes", PAIRS.values(), ids=PAIRS)
def test_save_and_load(changes, tmp_path):
    model = wrapped(**changes)
    ids, targets = random_ids(2, 6), random_ids(2, 5, seed=1)
    expected = model.pair(ids, None, targets).logits
    model.save_pretrained(tmp_path / "hf")
    twofold.save(model.pair, tmp_path / "own")
    for name in ("hf", "own"):  # transformers reads both formats, twofold too
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids, decoder_input_ids=targets).logits, expected)
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        assert loaded.generation_config.eos_token_id == [1]
        with pytest.warns(UserWarning, match="no tokenizer files"):
            pair = twofold.load(tmp_path / name)
        assert pair.config == model.pair_config
        assert torch.equal(pair(ids, None, targets).logits, expected)


def test_from_config_starts_as_the_pair_does():
    config = TwofoldConfig.of(pair_config(gemma_stack(), eoi_token_id=7, layout="merged"))
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert model.model.encoder.norm.weight.eq(0).all()  # 1 + weight
    assert model.model.encoder.embed_tokens.eoi_embedding.eq(0).all()
    for weight in (model.model.decoder.layers[2].mlp.up_proj.weight, model.get_input_embeddings().weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("size", [37, 48])
@pytest.mark.parametrize("changes", PAIRS.values(), ids=PAIRS)
def test_another_vocabulary(changes, size, tmp_path):
    model = wrapped(**changes)
    ids, targets = random_ids(2, 6) % 37, random_ids(2, 5, seed=1) % 37
    before = model(ids, torch.ones_like(ids), targets).logits
    n_tensors = len(list(model.parameters()))
    model.resize_token_embeddings(size)
    after = model(ids, torch.ones_like(ids), targets).logits
    assert after.shape[-1] == size == model.config.vocab_size
    assert torch.equal(after[..., : min(size, 40)], before[..., : min(size, 40)])
    assert len(list(model.parameters())) == n_tensors
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m")
    assert loaded.pair_config.encoder.vocab_size == loaded.pair_config.decoder.vocab_size == size
    assert torch.equal(loaded(ids, torch.ones_like(ids), targets).logits, after)


def test_new_rows():
    model = wrapped()
    mean = model.get_input_embeddings().weight.mean(0)
    model.resize_token_embeddings(41, pad_to_multiple_of=8)
    assert model.config.vocab_size == 48
    assert_same(model.get_input_embeddings().weight[40:], mean.expand(8, -1))
    model.resize_token_embeddings(4000, mean_resizing=False)
    assert model.get_output_embeddings().weight[48:].std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="at least 1 token"):
        model.resize_token_embeddings(0)


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("changes", [{}, LOSSLESS], ids=["t5gemma", "lossless"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing(changes, reentrant):
    """Also with frozen embeddings, as adapters train: gradients reach both stacks."""
    model = wrapped(**changes).train()
    ids, labels = random_ids(2, 6), random_ids(2, 5, seed=1)
    for table in (model.get_input_embeddings(), model.get_decoder().embed_tokens):
        table.weight.requires_grad_(False)

    def gradients():
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        # The last encoder layer of an aligned pair is read before its attention: no gradient comes there.
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    layer = model.model.decoder.layers[1].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients()
    assert len(calls) == 2
    assert plain.keys() <= again.keys()
    for name, gradient in again.items():
        assert_same(gradient, plain.get(name, torch.zeros_like(gradient)))
    model.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 3
    model.disable_input_require_grads()


def test_hidden_states():
    model = wrapped()
    output = model(random_ids(1, 4), decoder_input_ids=random_ids(1, 3), output_hidden_states=True)
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 4
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)


def test_other_encoder_outputs():
    model, ids, targets = wrapped(), random_ids(1, 4), random_ids(1, 3)
    read = BaseModelOutput(last_hidden_state=model.get_encoder()(ids).last_hidden_state)
    given = {"encoder_outputs": read, "decoder_input_ids": targets}
    assert_same(model(**given).logits, model(ids, decoder_input_ids=targets).logits)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert differ(model(attention_mask=mask, **given).logits, model(**given).logits)
    with pytest.raises(ValueError, match="several encoder layers"):
        wrapped(**LOSSLESS)(**given)


def test_what_is_refused():
    model, ids = wrapped(**LOSSLESS), random_ids(1, 4)
    with pytest.raises(ValueError, match="decoder_input_ids are missing"):
        model(ids)
    with pytest.raises(ValueError, match="do not take inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="a source is empty"):
        model(ids, torch.zeros_like(ids), labels=ids)
    with pytest.raises(ValueError, match="labels need input_ids"):
        model(encoder_outputs=model.get_encoder()(ids), labels=ids)
    with pytest.raises(ValueError, match="either input_ids or encoder_outputs"):
        model(decoder_input_ids=ids)
    with pytest.raises(ValueError, match="change the vocabulary with"):
        model.set_input_embeddings(torch.nn.Embedding(3, 32))
    with pytest.raises(ValueError, match="has no pair"):
        TwofoldForConditionalGeneration(TwofoldConfig())


def test_embeddings_can_be_exchanged():
    model = wrapped(tie_word_embeddings="all")
    table = torch.nn.Embedding(40, 32)
    model.set_input_embeddings(table)
    assert model.get_output_embeddings().weight is model.get_decoder().embed_tokens.weight is table.weight
    head = torch.nn.Linear(32, 40, bias=False)
    model.set_output_embeddings(head)
    assert model.pair.lm_head.out_proj is head


@pytest.mark.parametrize("first", ["import twofold", "import transformers; transformers.AutoConfig"])
def test_either_import_may_come_first(first, tmp_path):
    """And `import twofold` alone does not import transformers."""
    wrapped().save_pretrained(tmp_path / "m")
    script = (
        f"import sys; {first}\n"
        "assert ('transformers' in sys.modules) == ('twofold' not in sys.modules)\n"
        "import twofold\nfrom transformers import AutoModelForSeq2SeqLM\n"
        f"print(type(AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / 'm')!r})).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "TwofoldForConditionalGeneration"


def test_the_auto_config_has_what_tools_ask_for(tmp_path):
    wrapped(**LOSSLESS).save_pretrained(tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (40, 32, 3)
    assert (config.num_attention_heads, config.max_position_embeddings) == (4, 64)
    assert config.decoder_start_token_id is None
    assert config.architectures == ["TwofoldForConditionalGeneration"]
