"""The account of activations against what autograd keeps, byte for byte where attention is fused."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.models.tiny import gemma_stack, pair_config, stack
from tests.train.plan.account import kept_bytes
from twofold.models import EncoderDecoder
from twofold.train.plan.activations import AUTOCAST, BFLOAT16, FLOAT32, activations

# Numbers of positions that are no size of a weight, so that the tracker can tell weights.
ROWS, N, M = 2, 37, 29
PLAIN = {"layer_types": ("full_attention",) * 3, "sliding_window": None}
STACKS = {
    "llama": stack(**PLAIN, intermediate_size=56),
    "gemma": gemma_stack(**PLAIN, attn_logit_softcapping=None, intermediate_size=56),
    "biased, post-norms, no query norm": gemma_stack(
        **PLAIN, attn_logit_softcapping=None, qk_norm=False, qkv_bias=True
    ),
    "dropout": stack(**PLAIN, dropout_rate=0.1),
}
MEETINGS = [
    {"layout": layout, "reads": reads, "cross_rope": rope}
    for layout, reads, rope in (
        ("separate", "final", False), ("separate", "aligned", True), ("merged", "aligned", True)
    )
]  # fmt: skip
MEETINGS.append({**MEETINGS[2], "source_projections": "own"})


@pytest.fixture(autouse=True)
def _fused_attention(monkeypatch):
    """What is kept does not depend on who sees whom, only on no T x S tensor being made."""

    def attend(q, k, v, mask, **_):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    monkeypatch.setattr("twofold.models.attention.attend", attend)


def measured(config, numbers, trained="everything"):
    model = EncoderDecoder(config)
    model.initialise_randomly(0)
    model.train()
    if trained == "cross_attention":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("cross_attn" in name)
    elif trained == "all_but_encoder":
        model.encoder.requires_grad_(False)
    if numbers is BFLOAT16:
        model.to(torch.bfloat16)
    ids = torch.randint(3, 40, (ROWS, N)), torch.randint(3, 40, (ROWS, M))

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=numbers is AUTOCAST):
            return model.decoder(ids[1], torch.ones_like(ids[1]), model.encode(ids[0]), is_plain=True)[0]

    return kept_bytes(model, forward)


def compare(config, numbers, trained="everything"):
    kept = measured(config, numbers, trained)
    numbers = replace(numbers, has_bool_masks=False)
    account = activations(config, ROWS * N, ROWS * M, numbers, trained=trained).by_kind()
    pairs = {kind: (account[kind], kept.get(kind, 0)) for kind in account}
    # Whoever reads the encoder's output first is named as the one that keeps it; merged, that is self-attention.
    joint = ["decoder_cross_attention", "outside_blocks"]
    joint += ["decoder_self_attention"] if config.layout == "merged" else []
    pairs["joint"] = tuple(sum(column) for column in zip(*(pairs.pop(kind) for kind in joint), strict=True))
    if config.encoder.dropout_rate:  # one dropout module serves all sub-layers of a block
        pairs = {"all": tuple(sum(column) for column in zip(*pairs.values(), strict=True))}
    for kind, (predicted, tracked) in pairs.items():
        # Not in the account: norm weights and scalars.
        assert abs(predicted - tracked) <= 0.002 * tracked + 1000, (kind, predicted, tracked)


@pytest.mark.parametrize("numbers", [FLOAT32, AUTOCAST, BFLOAT16], ids=["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("side", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(
    "meeting", MEETINGS, ids=lambda m: f"{m['layout']} {m['reads']} {'own' * ('source_projections' in m)}"
)
def test_what_autograd_keeps(side, meeting, numbers):
    compare(pair_config(side, **meeting, pad_token_id=None), numbers)


@pytest.mark.parametrize("numbers", [FLOAT32, AUTOCAST], ids=["float32", "autocast"])
@pytest.mark.parametrize("trained", ["cross_attention", "all_but_encoder"])
def test_frozen_parts_keep_less(trained, numbers):
    compare(pair_config(STACKS["gemma"], **MEETINGS[0], pad_token_id=None), numbers, trained)


@pytest.mark.parametrize("numbers", [FLOAT32, AUTOCAST], ids=["float32", "autocast"])
def test_unequal_sides(numbers):
    encoder = stack(
        hidden_size=48, num_hidden_layers=2, layer_types=("full_attention",) * 2, sliding_window=None
    )
    compare(pair_config(encoder, STACKS["gemma"], pad_token_id=None), numbers)
