from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.hf import DONOR_CONFIGS, donor, lossless_pair
from tests.models.tiny import (
    MEETINGS,
    VOCAB,
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
from twofold import load, save
from twofold.models import DecoderCache, EncoderDecoder

# The lossless start: the pair computes its donor.

N_TOKENS = 18
CUTS = (0, 1, 7, 13)
"""Source lengths; windows are 4 tokens long. A text of one token leaves nothing for the source."""


@pytest.mark.parametrize("name", DONOR_CONFIGS)
@torch.no_grad()
def test_lossless_pair_is_its_donor(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    pair = lossless_pair(model)
    text = random_ids(2, N_TOKENS, seed=6)
    wanted = model(text, use_cache=False).logits
    for cut in CUTS:
        assert_same(pair(text[:, :cut], decoder_input_ids=text[:, cut:]).logits, wanted[:, cut:])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_lossless_pair_with_a_padded_source(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    pair = lossless_pair(model)
    text = random_ids(2, N_TOKENS, seed=6)
    wanted = model(text, use_cache=False).logits
    cuts = [9, 5]
    for side in ("left", "right"):
        source, source_mask = padded(text[:, :9], cuts, side)
        targets = [text[row, cut:] for row, cut in enumerate(cuts)]
        target = torch.zeros(2, 13, dtype=torch.int64)
        target_mask = torch.zeros(2, 13, dtype=torch.bool)
        for row, ids in enumerate(targets):
            target[row, : len(ids)] = ids
            target_mask[row, : len(ids)] = True
        logits = pair(source, source_mask, target, target_mask).logits
        for row, cut in enumerate(cuts):
            assert_same(logits[row, : N_TOKENS - cut], wanted[row, cut:])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_lossless_pair_decodes_in_steps(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    pair = lossless_pair(model)
    text = random_ids(2, N_TOKENS, seed=6)
    wanted = model(text, use_cache=False).logits
    for cut in CUTS:
        encoded, cache = pair.encode(text[:, :cut]), DecoderCache()
        for i in range(cut, N_TOKENS):
            logits = pair(decoder_input_ids=text[:, i : i + 1], encoder_output=encoded, cache=cache).logits
            assert_same(logits[:, 0], wanted[:, i])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_lossless_pairs_packed_in_one_row(name: str) -> None:
    model = donor(DONOR_CONFIGS[name])
    pair = lossless_pair(model)
    texts = [random_ids(1, n, seed=n) for n in (15, 9, 12)]
    cuts = [8, 1, 6]
    source, source_segments = pack([text[0, :cut] for text, cut in zip(texts, cuts, strict=True)], 20)
    target, target_segments = pack([text[0, cut:] for text, cut in zip(texts, cuts, strict=True)], 22)
    logits = pair(
        source, decoder_input_ids=target, segment_ids=source_segments, decoder_segment_ids=target_segments
    ).logits[0]
    for i, (text, cut) in enumerate(zip(texts, cuts, strict=True), start=1):
        assert_same(logits[target_segments[0] == i], model(text, use_cache=False).logits[0, cut:])


# Packing.


def pack(rows: list[Tensor], n_tokens: int) -> tuple[Tensor, Tensor]:
    """Rows behind each other in one, then padding; and their segment ids 1, 2, 3..."""
    ids, segments = torch.zeros(1, n_tokens, dtype=torch.int64), torch.zeros(1, n_tokens, dtype=torch.int64)
    start = 0
    for i, row in enumerate(rows, start=1):
        ids[0, start : start + len(row)] = row
        segments[0, start : start + len(row)] = i
        start += len(row)
    return ids, segments


def grads(model: EncoderDecoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("encoder_mask", "weight"), [("bidirectional", 1.0), ("sink", 1.0), ("causal", 1.0), ("sink", 0.2)]
)
@pytest.mark.parametrize("meeting", MEETINGS, ids=meeting_id)
def test_packed_rows_equal_the_same_pairs_alone(
    meeting: dict[str, Any], encoder_mask: str, weight: float
) -> None:
    """Logits, and gradients of the summed losses; windows of 3, the first pair longer than two of them."""
    config = pair_config(
        gemma_stack(), encoder_mask=(encoder_mask,) * 3, encoder_future_weight=weight, **meeting
    )
    model = build(config, qk_factor=2.0)
    sources = [random_ids(1, n, seed=n)[0] for n in (8, 3, 5)]
    targets = [random_ids(1, n, seed=10 + n)[0] for n in (7, 4, 2)]
    weights = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0))

    alone, total, start = [], torch.zeros(()), 0
    for source, target in zip(sources, targets, strict=True):
        logits = model(source[None], decoder_input_ids=target[None]).logits[0]
        total = total + (logits.log_softmax(-1) * weights[start : start + len(target)]).sum()
        start += len(target)
        alone.append(logits.detach())
    total.backward()
    wanted = grads(model)
    model.zero_grad()

    source_ids, source_segments = pack(sources, 18)
    target_ids, target_segments = pack(targets, 15)
    packed = model(
        source_ids,
        decoder_input_ids=target_ids,
        segment_ids=source_segments,
        decoder_segment_ids=target_segments,
    ).logits[0]
    is_real = target_segments[0] > 0
    assert_same(packed[is_real].detach(), torch.cat(alone))
    (packed[is_real].log_softmax(-1) * weights[:start]).sum().backward()
    found = grads(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], 2e-5)


@torch.no_grad()
def test_segments_do_not_see_each_other() -> None:
    model = build(pair_config(stack()))
    source, segments = pack([random_ids(1, 4)[0], random_ids(1, 4, seed=1)[0]], 8)
    target, target_segments = pack([random_ids(1, 3)[0], random_ids(1, 3, seed=1)[0]], 6)

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(
            ids, decoder_input_ids=target, segment_ids=segments, decoder_segment_ids=target_segments
        ).logits
        return logits

    before = run(source)
    source[0, 1] = 3 if source[0, 1] != 3 else 4
    after = run(source)
    assert differ(before[:, :3], after[:, :3])
    assert torch.equal(before[:, 3:], after[:, 3:])


# Opening an encoder by degrees.


@pytest.mark.parametrize("softcap", [None, 3.0])
@torch.no_grad()
def test_a_future_weight_goes_from_causal_to_open(softcap: float | None) -> None:
    """Near 0 the causal encoder, at 1 the open one, in between neither; padding on the right of one row."""
    model = build(pair_config(gemma_stack(attn_logit_softcapping=softcap)), qk_factor=2.0)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0

    def read(masks: Any, weight: float = 1.0) -> Tensor:
        model.set_encoder_mask(masks, future_weight=weight)
        return model.encode(ids, mask).last_hidden_state[mask == 1]

    causal, sink = read("causal"), read("sink")
    assert_same(read("sink", 1e-9), causal, 1e-4)
    assert_same(read("sink", 1 - 1e-7), sink)
    assert differ(read("sink", 0.1), causal)
    assert differ(read("sink", 0.1), sink)
    assert torch.equal(read("causal", 0.1), causal)


def test_the_config_follows_the_mask_and_refuses_nonsense() -> None:
    model = build(pair_config(stack()))
    model.set_encoder_mask(["sink", "causal", "sink"], future_weight=0.5)
    assert model.config.encoder_mask == ("sink", "causal", "sink")
    assert model.config.encoder_future_weight == 0.5
    with pytest.raises(ValueError, match="2 entries for 3 encoder layers"):
        model.set_encoder_mask(["sink", "causal"])
    with pytest.raises(ValueError, match="encoder_future_weight"):
        model.set_encoder_mask("sink", future_weight=0.0)
    assert model.config.encoder_mask == ("sink", "causal", "sink")


# One stack of weights for both sides.


def tied_and_copied(**changes: Any) -> tuple[EncoderDecoder, EncoderDecoder]:
    """A tied pair, and one of two stacks with the same values."""
    settings = {"layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue"}
    settings |= {"tie_word_embeddings": "all", "encoder_mask": ("sink",) * 3} | changes
    tied = build(pair_config(gemma_stack(), tie_stacks=True, **settings))
    copied = build(pair_config(gemma_stack(), **settings))
    state = dict(tied.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter.copy_(state[name])
    return tied, copied


@pytest.mark.parametrize("tie", ["all", "none"])
def test_tied_stacks_compute_the_same_with_half_the_parameters(tie: str) -> None:
    tied, copied = tied_and_copied(tie_word_embeddings=tie)
    source, target = random_ids(2, 7), random_ids(2, 5, seed=1)
    found, wanted = (model(source, None, target).logits for model in (tied, copied))
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    summed = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
    for name, parameter in tied.named_parameters():
        twin = name.replace("model.encoder.", "model.decoder.")
        both = [summed[n] for n in {name, twin} if n in summed]
        assert parameter.grad is not None
        assert_same(parameter.grad, sum(both, start=torch.zeros_like(parameter)), 2e-5)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, copied)]
    stack_size = sum(p.numel() for n, p in copied.named_parameters() if n.startswith("model.decoder."))
    assert sizes[1] - sizes[0] == stack_size > 0


def test_stacks_that_differ_cannot_be_tied() -> None:
    with pytest.raises(ValueError, match=r"tie_stacks makes one stack of both.*unequal"):
        pair_config(
            stack(),
            stack(intermediate_size=64),
            layout="merged",
            tie_word_embeddings="all",
            tie_stacks=True,
        )
    with pytest.raises(ValueError, match="got layout='separate'"):
        pair_config(stack(), tie_word_embeddings="all", tie_stacks=True)


# Projections of its own for the source.


def own_and_shared(**changes: Any) -> tuple[EncoderDecoder, EncoderDecoder]:
    """A merged pair with projections of its own for the source, and one without; else the same values."""
    settings = {"layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue"}
    settings |= {"encoder_mask": ("causal",) * 3} | changes
    own = build(pair_config(gemma_stack(), source_projections="own", **settings))
    shared = build(pair_config(gemma_stack(), **settings))
    state = dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            parameter.copy_(state[name])
    return own, shared


@torch.no_grad()
def test_own_projections_with_the_values_of_the_shared_ones_change_nothing() -> None:
    """Gemma's k norm and RoPE come after them; then keys, values and their biases each move the logits."""
    own, shared = own_and_shared()
    for layer in own.decoder.layers:
        for kind in "kv":
            source = getattr(layer.self_attn, f"source_{kind}_proj")
            source.weight.copy_(getattr(layer.self_attn, f"{kind}_proj").weight)
            source.bias.zero_()
    source, target = random_ids(2, 7), random_ids(2, 5, seed=1)
    wanted = shared(source, None, target).logits
    assert_same(own(source, None, target).logits, wanted)
    attention = own.decoder.layers[1].self_attn
    for parameter in (*attention.source_k_proj.parameters(), *attention.source_v_proj.parameters()):
        before = parameter.clone()
        parameter += 0.3
        assert differ(own(source, None, target).logits, wanted)
        parameter.copy_(before)


def test_own_projections_join_unequal_widths_and_heads(tmp_path: Any) -> None:
    """Keys and values have the decoder's heads; the encoder gets a gradient through them; a file keeps them."""
    wide = stack(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=4)
    narrow = stack(num_key_value_heads=1, num_hidden_layers=2, layer_types=("full_attention",) * 2)
    config = pair_config(wide, narrow, **MEETINGS[15], aligned_layers=(0, 2), source_projections="own")
    model = build(config)
    assert model.decoder.layers[0].self_attn.source_k_proj.weight.shape == (8, 48)
    source, target = random_ids(2, 7), random_ids(2, 5, seed=1)
    logits = model(source, None, target).logits
    logits.square().sum().backward()
    for name in (
        "model.encoder.layers.1.mlp.up_proj.weight",
        "model.decoder.layers.0.self_attn.source_v_proj.bias",
    ):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-4
    save(model, tmp_path / "pair")
    with pytest.warns(UserWarning, match="no tokenizer files"):
        loaded = load(tmp_path / "pair")
    assert torch.equal(loaded(source, None, target).logits, logits)


def test_own_projections_are_for_merged_layouts_of_two_stacks() -> None:
    wide, narrow = stack(hidden_size=48), stack()
    with pytest.raises(ValueError, match="layout='separate' cross-attention has projections of its own"):
        pair_config(wide, narrow, source_projections="own")
    with pytest.raises(ValueError, match="encoder width 48 and decoder width 32 must be equal"):
        pair_config(wide, narrow, layout="merged")
    with pytest.raises(ValueError, match="one embedding table for both sides needs equal widths"):
        pair_config(wide, narrow, layout="merged", source_projections="own", tie_word_embeddings="all")
    with pytest.raises(ValueError, match=r"tie_stacks makes one stack of both.*source_projections='own'"):
        pair_config(
            narrow, layout="merged", source_projections="own", tie_word_embeddings="all", tie_stacks=True
        )


@pytest.mark.parametrize("format", ["t5gemma", "t5gemma2"])
def test_own_projections_fit_no_released_format(format: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="source_projections is 'own', not 'shared'"):
        save(own_and_shared()[0], tmp_path / "pair", format=format)


# What the encoder sees (D4).


@pytest.mark.parametrize("backend", ["auto", "eager"])
@torch.no_grad()
def test_last_input_token_reaches_the_first_state_unless_causal(backend: Any) -> None:
    source = random_ids(2, 9)
    changed = source.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 2) % (VOCAB - 3)
    assert (changed[:, -1] != source[:, -1]).all()
    for pad in (0, None):
        for mask in ("bidirectional", "sink", "causal"):
            model = build(pair_config(stack(), encoder_mask=(mask,) * 3, pad_token_id=pad))
            model.set_attention_backend(backend)
            before = model.encode(source).last_hidden_state
            after = model.encode(changed).last_hidden_state
            assert differ(before[:, -1], after[:, -1])
            if mask == "causal":
                assert torch.equal(before[:, :-1], after[:, :-1])
            elif mask == "sink":
                assert torch.equal(before[:, 0], after[:, 0])
                assert differ(before[:, 1], after[:, 1])
            else:
                assert differ(before[:, 0], after[:, 0])


@pytest.mark.parametrize("encoder_mask", ["bidirectional", "sink", "causal"])
@torch.no_grad()
def test_no_mask_equals_a_mask_of_ones(encoder_mask: str) -> None:
    source, target = random_ids(2, 9), random_ids(2, 7, seed=1)
    for pad in (0, None):  # with None tokens are known to be plain and attention takes its shortcuts
        for layout in ("separate", "merged"):
            config = pair_config(stack(), encoder_mask=(encoder_mask,) * 3, pad_token_id=pad, layout=layout)
            model = build(config)
            wanted = model(source, torch.ones_like(source), target, torch.ones_like(target)).logits
            assert_same(model(source, decoder_input_ids=target).logits, wanted)
            as_bool = model(source, torch.ones_like(source).bool(), target, torch.ones_like(target).bool())
            assert torch.equal(as_bool.logits, wanted)


@torch.no_grad()
def test_masks_are_chosen_per_layer() -> None:
    """Layer 0 open, the others causal: the last token is seen once, and from then on only through layer 0."""
    source = random_ids(1, 9)
    changed = source.clone()
    changed[0, -1] = 3 if changed[0, -1] != 3 else 4
    model = build(pair_config(stack(), encoder_mask=("causal", "causal", "bidirectional")))
    before = model.encode(source, output_hidden_states=True).hidden_states
    after = model.encode(changed, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        assert torch.equal(before[layer][0, 0], after[layer][0, 0])
    assert differ(before[3][0, 0], after[3][0, 0])


# Padding inferred from ids.


@torch.no_grad()
def test_pad_tokens_are_padding_unless_they_mean_more() -> None:
    source, mask = padded(random_ids(2, 8), [8, 5], "right")
    target = random_ids(2, 4, seed=1)
    own_pad = build(pair_config(stack()))
    given = own_pad(source, mask, target).logits
    assert torch.equal(own_pad(source, decoder_input_ids=target).logits, given)
    for changes in ({"pad_token_id": None}, {"eos_token_ids": (1, 0)}, {"bos_token_id": 0}):
        model = build(pair_config(stack(), **changes))
        logits = model(source, decoder_input_ids=target).logits
        assert differ(logits, given)
        assert_same(logits, model(source, torch.ones_like(source), target).logits)


@torch.no_grad()
def test_an_empty_source_is_like_a_row_of_padding() -> None:
    source, target = random_ids(2, 5), random_ids(2, 4, seed=1)
    for meeting in MEETINGS:
        for pad in (0, None):
            model = build(pair_config(stack(), pad_token_id=pad, **meeting))
            wanted = model(source, torch.zeros_like(source), target).logits
            assert_same(model(source[:, :0], decoder_input_ids=target).logits, wanted)


@torch.no_grad()
def test_a_row_of_padding_is_finite() -> None:
    """Rule R16, through whole stacks of every layout."""
    for meeting in MEETINGS:
        model = build(pair_config(gemma_stack(), **meeting))
        source = random_ids(2, 5)
        mask = torch.tensor([[True] * 5, [False] * 5])
        assert torch.isfinite(model(source, mask, random_ids(2, 4)).logits).all()


# What is handed over.


@torch.no_grad()
def test_aligned_reads_are_the_normed_inputs_of_the_named_layers() -> None:
    model = build(pair_config(stack(), reads="aligned", aligned_layers=(2, 0, 0)))
    output = model.encode(random_ids(2, 6), output_hidden_states=True)
    layers = model.encoder.layers
    for memory, i in zip(output.memory, (2, 0, 0), strict=True):
        norm: Any = layers[i].pre_self_attn_layernorm
        assert torch.equal(memory, norm(output.hidden_states[i]))
    final = build(pair_config(stack())).encode(random_ids(2, 6), output_hidden_states=True)
    assert len(final.memory) == 1
    assert final.memory[0] is final.last_hidden_state
    assert torch.equal(final.hidden_states[-1], final.last_hidden_state)
    assert len(final.hidden_states) == 4


@torch.no_grad()
def test_hidden_states_are_returned_on_request_only() -> None:
    model = build(pair_config(stack()))
    source, target = random_ids(1, 5), random_ids(1, 4)
    plain = model(source, decoder_input_ids=target)
    assert (plain.encoder.hidden_states, plain.decoder_hidden_states) == ((), ())
    asked = model(source, decoder_input_ids=target, output_hidden_states=True)
    assert (len(asked.encoder.hidden_states), len(asked.decoder_hidden_states)) == (4, 4)
    assert torch.equal(model.lm_head(asked.decoder_hidden_states[-1]), plain.logits)


@torch.no_grad()
def test_encoding_beforehand_changes_nothing() -> None:
    model = build(pair_config(stack()))
    source, target = random_ids(2, 5), random_ids(2, 4)
    encoded = model.encode(source)
    assert torch.equal(
        model(decoder_input_ids=target, encoder_output=encoded).logits,
        model(source, decoder_input_ids=target).logits,
    )


def test_logits_are_float32_and_capped_in_float32() -> None:
    model = build(pair_config(gemma_stack(final_logit_softcapping=0.5))).to(torch.bfloat16)
    logits = model(random_ids(1, 5), decoder_input_ids=random_ids(1, 4)).logits
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 0.5
    # Values near the cap that bfloat16 cannot tell apart stay distinct.
    assert len(logits.unique()) > len(logits.to(torch.bfloat16).unique())


# Ties and random initialisation.


@pytest.mark.parametrize(("ties", "n_tables"), [("all", 1), ("decoder", 2), ("none", 3)])
def test_ties(ties: str, n_tables: int) -> None:
    model = EncoderDecoder(pair_config(stack(), tie_word_embeddings=ties, eoi_token_id=7))
    tables = {
        id(t)
        for t in (
            model.encoder.embed_tokens.weight,
            model.decoder.embed_tokens.weight,
            model.lm_head.out_proj.weight,
        )
    }
    assert len(tables) == n_tables
    shares_eoi = model.encoder.embed_tokens.eoi_embedding is model.decoder.embed_tokens.eoi_embedding
    assert shares_eoi == (ties == "all")


@pytest.mark.parametrize("ties", ["all", "decoder", "none"])
def test_random_initialisation(ties: str) -> None:
    encoder = gemma_stack(
        initializer_range=0.02, qkv_bias=True, num_hidden_layers=1, layer_types=("full_attention",)
    )
    decoder = stack(initializer_range=0.1, output_bias=True)
    if ties == "all":
        decoder = decoder.model_copy(update={"initializer_range": 0.02})
    config = pair_config(encoder, decoder, tie_word_embeddings=ties, eoi_token_id=7)
    model = build(config, seed=9)
    model.initialise_randomly(seed=5)
    for side, std in ((model.encoder, encoder.initializer_range), (model.decoder, decoder.initializer_range)):
        for name, parameter in side.named_parameters():
            if parameter.ndim == 2:
                assert abs(parameter.std().item() / std - 1) < 0.2, name
            elif "norm" in name:
                neutral = 0.0 if side is model.encoder else 1.0
                assert torch.equal(parameter, torch.full_like(parameter, neutral)), name
            else:
                assert parameter.abs().max() == 0, name
    assert abs(model.lm_head.out_proj.weight.std().item() / decoder.initializer_range - 1) < 0.2
    again = build(config, seed=8)
    again.initialise_randomly(seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.initialise_randomly(seed=6)
    assert not torch.equal(model.encoder.embed_tokens.weight, again.encoder.embed_tokens.weight)


# Errors.


def call(**changes: Any) -> None:
    model = EncoderDecoder(pair_config(stack(max_position_embeddings=12), **changes.pop("config", {})))
    arguments: dict[str, Any] = {"input_ids": random_ids(2, 6), "decoder_input_ids": random_ids(2, 5)}
    if changes.pop("encoded", False):
        arguments["encoder_output"] = model.encode(arguments.pop("input_ids"))
    with torch.no_grad():
        model(**(arguments | changes))


ONES = torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_input_ids": None}, "decoder_input_ids are missing; pass the target shifted right"),
        ({"input_ids": None}, "pass either input_ids or encoder_output: exactly one"),
        (
            {"encoded": True, "input_ids": random_ids(2, 6)},
            "pass either input_ids or encoder_output: exactly one",
        ),
        (
            {"encoded": True, "attention_mask": ONES},
            "attention_mask and segment_ids are part of encoder_output",
        ),
        ({"encoded": True, "segment_ids": ONES}, "attention_mask and segment_ids are part of encoder_output"),
        ({"decoder_input_ids": random_ids(3, 5)}, "decoder_input_ids have 3 rows, the source has 2"),
        (
            {"input_ids": random_ids(2, 6)[0]},
            r"encoder ids must be an int64 tensor \[batch, tokens\], got torch.int64 \[6\]",
        ),
        (
            {"input_ids": torch.ones(2, 6)},
            r"encoder ids must be an int64 tensor .* got torch.float32 \[2, 6\]",
        ),
        ({"decoder_input_ids": torch.ones(2, 5)}, "decoder ids must be an int64 tensor"),
        (
            {"attention_mask": ONES, "segment_ids": ONES},
            "encoder: pass an attention mask or segment ids, not both",
        ),
        (
            {"attention_mask": ONES[:, :5]},
            r"encoder mask or segment ids must have the shape of the ids, \[2, 6\], got \[2, 5\]",
        ),
        ({"segment_ids": ONES[:1]}, r"must have the shape of the ids, \[2, 6\], got \[1, 6\]"),
        (
            {"decoder_attention_mask": ONES},
            r"decoder mask or segment ids must have the shape of the ids, \[2, 5\]",
        ),
        (
            {"decoder_attention_mask": ONES[:, :5], "decoder_segment_ids": ONES[:, :5]},
            "decoder: pass an attention mask or segment ids, not both",
        ),
        (
            {"input_ids": random_ids(2, 13)},
            r"encoder sequence of 13 tokens is longer than max_position_embeddings \(12\); shorten",
        ),
        (
            {"decoder_input_ids": random_ids(2, 13)},
            "decoder sequence of 13 tokens is longer than max_position",
        ),
        (
            {"decoder_input_ids": random_ids(2, 7), "config": {"decoder_positions": "continue"}},
            "decoder sequence of 13 tokens is longer",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], reason: str) -> None:
    call()
    with pytest.raises(ValueError, match=reason):
        call(**changes)


def test_lengths_up_to_the_limit_are_fine() -> None:
    call(input_ids=random_ids(2, 12), decoder_input_ids=random_ids(2, 12))
    call(decoder_input_ids=random_ids(2, 6), config={"decoder_positions": "continue"})
    # A packed row may be longer: positions begin anew in each of its segments.
    ids = random_ids(2, 20)
    segments = torch.arange(20).div(5, rounding_mode="floor").add(1).expand(2, 20)
    for positions in ("restart", "continue"):
        call(
            input_ids=ids,
            segment_ids=segments,
            decoder_input_ids=ids,
            decoder_segment_ids=segments,
            config={"decoder_positions": positions},
        )


@torch.no_grad()
def test_cached_tokens_count_against_the_limit() -> None:
    model = EncoderDecoder(pair_config(stack(max_position_embeddings=12)))
    encoded, cache = model.encode(random_ids(1, 6)), DecoderCache()
    model(decoder_input_ids=random_ids(1, 12), encoder_output=encoded, cache=cache)
    with pytest.raises(ValueError, match="decoder sequence of 13 tokens is longer"):
        model(decoder_input_ids=random_ids(1, 1), encoder_output=encoded, cache=cache)
