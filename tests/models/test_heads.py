import pytest
import torch
from transformers import T5GemmaConfig, T5GemmaForSequenceClassification

from tests.models.hf import load_mapped
from tests.models.tiny import VOCAB, assert_same, build, padded, pair_config, random_ids, randomise, stack
from twofold.models import EncoderClassifier, EncoderDecoder, embed
from twofold.models.families import PAIRS
from twofold.models.heads import last_token, mean_pooled
from twofold.models.masks import Tokens

SIDE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 3.0,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classifier_is_that_of_transformers(side: str) -> None:
    """Their encoder-only mode pools the last real token, wherever the padding is."""
    config = T5GemmaConfig(
        encoder=dict(SIDE), decoder=dict(SIDE), vocab_size=VOCAB, num_labels=3, attn_implementation="eager"
    )
    family = PAIRS["t5gemma"]
    ours = EncoderClassifier(EncoderDecoder(family.read_config(config.to_dict())), num_labels=3).eval()
    theirs = T5GemmaForSequenceClassification(config, is_encoder_decoder=False).eval()
    randomise(theirs, qk_factor=3.0)
    weights = theirs.state_dict()
    score = {name: weights.pop(name) for name in list(weights) if name.startswith("score.")}
    assert load_mapped(ours.encoder, weights, family.tensor_map, prefix="model.encoder.") == set()
    assert ours.load_state_dict(score, strict=False).unexpected_keys == []
    assert set(score) == {"score.out_proj.weight", "score.out_proj.bias"}
    ids, mask = padded(random_ids(4, 9), [9, 1, 5, 8], side)
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    assert wanted.shape == (4, 3)
    assert_same(ours(ids, mask), wanted)
    assert_same(ours(ids), wanted)  # pads are inferred
    for row, length in enumerate([9, 1, 5, 8]):
        alone = ids[row : row + 1, 9 - length :] if side == "left" else ids[row : row + 1, :length]
        assert_same(ours(alone), wanted[row : row + 1])


def test_classifier_keeps_the_encoder_and_drops_the_decoder() -> None:
    model = build(pair_config(stack(), classifier_dropout_rate=0.5))
    classifier = EncoderClassifier(model, num_labels=2)
    assert classifier.encoder is model.encoder
    assert {name.split(".")[0] for name, _ in classifier.named_parameters()} == {"encoder", "score"}
    assert classifier.score.dropout.p == 0.5
    assert EncoderClassifier(model, num_labels=2, dropout_rate=0.0).score.dropout.p == 0.0
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        EncoderClassifier(model, num_labels=0)


SEGMENTS = [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]]


def test_last_token() -> None:
    hidden = torch.arange(12.0).view(3, 4, 1)
    assert last_token(hidden, Tokens.from_segments(torch.tensor(SEGMENTS))).flatten().tolist() == [2, 7, 10]


def test_mean_pooling() -> None:
    hidden = torch.arange(12.0).view(3, 4, 1)
    assert mean_pooled(hidden, Tokens.from_segments(torch.tensor(SEGMENTS))).flatten().tolist() == [1, 6, 9]


def test_mean_is_summed_in_float32() -> None:
    hidden = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    pooled = mean_pooled(hidden, Tokens.from_segments(torch.ones(1, 1000, dtype=torch.int64)))
    assert (pooled.item(), pooled.dtype) == (1.0, torch.bfloat16)


@torch.no_grad()
def test_embedding_of_a_text_does_not_depend_on_its_padding() -> None:
    model = build(pair_config(stack()))
    ids = random_ids(3, 7)
    lengths = [7, 3, 5]
    alone = []
    for row, length in zip(ids, lengths, strict=True):
        states = model.encode(row[None, :length]).last_hidden_state[0]
        alone.append(sum(states.unbind()) / length)
    for side in ("left", "right"):
        source, mask = padded(ids, lengths, side)
        assert_same(embed(model, source, mask), torch.stack(alone))
        assert_same(embed(model, source), torch.stack(alone))


def test_rows_without_a_token_cannot_be_pooled() -> None:
    tokens = Tokens.from_segments(torch.tensor([[1, 1], [0, 0]]))
    for pool in (last_token, mean_pooled):
        with pytest.raises(
            ValueError, match="a row has no real token to pool; every source needs at least one"
        ):
            pool(torch.zeros(2, 2, 3), tokens)
