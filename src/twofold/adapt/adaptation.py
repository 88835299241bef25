"""`adapt`: any decoder-only checkpoint, or two of one tokenizer, becomes an encoder-decoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from twofold.adapt.depth import DepthChoice, choose_decoder_layers
from twofold.adapt.initialise import Donor, initialise, unused_tensors
from twofold.adapt.plan import Choices, MaskChoice, Plan, PlannedTensor, Side, Start, plan_adaptation
from twofold.adapt.profile import Profile, profile_encoder
from twofold.adapt.refit import Refit, refit_decoder
from twofold.adapt.stitch import Stitch, stitch
from twofold.checkpoint import Checkpoint, copy_tokenizer, resolve, same_tokenizer
from twofold.checkpoint.card import donor_of, versions
from twofold.checkpoint.save import CheckpointWriter
from twofold.config.history import Donor as DonorRecord
from twofold.config.history import History, Origin
from twofold.models import EncoderDecoder
from twofold.models.families import donor_family

Initialised = tuple[PlannedTensor, torch.Tensor]
"""A parameter of the pair with its value."""

Profiler = Callable[[EncoderDecoder], Profile]
"""What `encoder_mask="auto"` asks."""

DepthChooser = Callable[[EncoderDecoder, int], DepthChoice]
"""What `decoder_depth` asks."""

Refitter = Callable[[EncoderDecoder, Sequence[int]], Refit]
"""What mends a decoder behind `decoder_depth`."""

Stitcher = Callable[[EncoderDecoder], Stitch]
"""What `start="stitched"` asks."""


def adapt(
    encoder: str | Path,
    decoder: str | Path | None = None,
    *,
    start: Start | None = None,
    encoder_mask: MaskChoice | None = None,
    future_share: float = 1.0,
    encoder_layers: Sequence[int] | None = None,
    decoder_layers: Sequence[int] | None = None,
    decoder_depth: int | None = None,
    layout: Literal["separate", "merged"] | None = None,
    reads: Literal["final", "aligned"] | None = None,
    cross_rope: bool | None = None,
    decoder_positions: Literal["restart", "continue"] | None = None,
    decoder_start: Literal["bos", "last_source_token"] | None = None,
    aligned_layers: Sequence[int] | None = None,
    tie_stacks: bool = False,
    output_scale: float = 0.1,
    profile: Profiler = profile_encoder,
    choose: DepthChooser = choose_decoder_layers,
    refit: Refitter | None = refit_decoder,
    stitcher: Stitcher = stitch,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> EncoderDecoder:
    """Make an encoder-decoder in memory.

    Args:
        encoder: donor of the encoder: a folder, a hub name or a GGUF file.
        decoder: donor of the decoder. None: the encoder's donor, a balanced pair.
        start: how the two halves meet at first; see `adapt.plan`. Default: `lossless`, and `stitched` where the donors'
            widths differ.
        encoder_mask: one for all layers or one per layer. `auto`, for the lossless start: as open as `profile` finds to
            cost next to nothing. Default: `auto` for the lossless start, `causal` for the stitched one, which fits to
            the masks there are, else `bidirectional`. With `causal` a lossless pair equals its donor.
        future_share: of a query's attention, what later keys get at most; see `EncoderDecoderConfig`.
        encoder_layers: donor layers that the encoder keeps; default all.
        decoder_layers: donor layers that the decoder keeps; default all.
        decoder_depth: how many of them stay, where measurement is to say which; see `choose_decoder_layers`. They are
            fitted to make up for the others as far as they can (`refit`).
        layout: `separate` or `merged` attention to the source; like the next four, by default the start's own.
        reads: `final` or `aligned`.
        cross_rope: rotate encoder keys.
        decoder_positions: `restart` or `continue`.
        decoder_start: the decoder's first input, `bos` or `last_source_token`.
        aligned_layers: for `aligned` reads, the encoder layer each decoder layer reads; default by relative depth.
        tie_stacks: one donor, merged layout: both sides share its weights, see `EncoderDecoderConfig`.
        output_scale: `scaled_copy` only.
        profile: for `encoder_mask="auto"`; give `functools.partial(profile_encoder, texts=..., budget=...)` for texts
            of your own, or another budget.
        choose: for `decoder_depth`, likewise.
        refit: mends what `decoder_depth` leaves, likewise; see `refit_decoder`, which families with norms behind their
            MLPs (Gemma 2 and 3) go without. None: the layers stay as they were.
        stitcher: for `start="stitched"`, likewise; see `adapt.stitch.stitch`.
        dtype: of all parameters; default: that of the decoder donor (float32 where it is quantised).
        seed: of random parameters.

    Returns:
        The pair in eval mode on the CPU, with the donor's tokenizer, and the report of `adaptation.json` as
        `model.adaptation`.

    Raises:
        ValueError: donors that do not go together, or choices that they do not allow.
        FileNotFoundError: a donor that is not there.
    """
    choices = Choices(
        start=start,
        encoder_mask=encoder_mask,
        future_share=future_share,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        decoder_depth=decoder_depth,
        layout=layout,
        reads=reads,
        cross_rope=cross_rope,
        decoder_positions=decoder_positions,
        decoder_start=decoder_start,
        aligned_layers=aligned_layers,
        tie_stacks=tie_stacks,
        output_scale=output_scale,
    )
    choices, findings, fitted, model = settle(
        encoder,
        decoder,
        choices,
        profile=profile,
        choose=choose,
        refit=refit,
        stitcher=stitcher,
        dtype=dtype,
        seed=seed,
        keeps_pair=True,
    )
    if model is None:
        model = _in_memory(encoder, decoder, choices, dtype, seed, fitted)
    assert model.adaptation is not None
    model.adaptation |= findings
    assert model.history is not None
    assert model.history.origin is not None
    fitted_on = {"fitted_tokens": _fitted_tokens(findings)}
    model.history = History(origin=model.history.origin.model_copy(update=fitted_on))
    return model


def _in_memory(
    encoder: str | Path,
    decoder: str | Path | None,
    choices: Choices,
    dtype: torch.dtype | None,
    seed: int,
    fitted: Mapping[str, torch.Tensor] | None = None,
) -> EncoderDecoder:
    with open_adaptation(encoder, decoder, choices, dtype, seed, fitted) as adaptation:
        with torch.device("meta"):
            model = EncoderDecoder(adaptation.plan.config)
        state = {planned.name: tensor for planned, tensor in adaptation.tensors()}
        model.load_state_dict(state, assign=True, strict=False)  # shared parameters come under one name
        model.tie_weights()
        model.tokenizer = adaptation.tokenizer
        model.adaptation = adaptation.report()
        model.history = History(origin=adaptation.origin())
    assert not any(p.is_meta for p in model.parameters()), "the plan left a parameter without a value"
    return model.requires_grad_(True).eval()


class Settled(NamedTuple):
    """What measurement and fits leave to do."""

    choices: Choices
    """With masks and layers by name."""
    findings: dict[str, Any]
    """For the report: `profile`, `depth`, `refit`, `stitch`."""
    fitted: Mapping[str, torch.Tensor] | None
    """Tensors by the names of the pair's parameters; None where none are fitted."""
    pair: EncoderDecoder | None
    """Of these choices, where it was made on the way and is to be kept."""


def settle(
    encoder: str | Path,
    decoder: str | Path | None,
    choices: Choices,
    *,
    profile: Profiler,
    choose: DepthChooser,
    refit: Refitter | None,
    stitcher: Stitcher,
    dtype: torch.dtype | None,
    seed: int,
    keeps_pair: bool = False,
) -> Settled:
    """Replace what choices leave to measurement (`encoder_mask="auto"`, `decoder_depth`) or to a fit (`stitched`) by
    what is found on the pair, which is held in memory for it.

    Without a tokenizer nothing can be measured: an encoder mask that was not chosen is `causal` then, with a warning.

    Args:
        keeps_pair: measure the pair as it will be. Otherwise its stacks share one copy of the donor where they can.

    Raises:
        ValueError, FileNotFoundError: see `adapt`, `profile_encoder`, `choose_decoder_layers`, `stitch`.
    """
    encoder_donor = resolve(encoder)
    decoder_donor = encoder_donor if decoder is None else resolve(decoder)
    configs = (donor_family(c.config).read_config(c.config) for c in (encoder_donor, decoder_donor))
    choices = choices.with_start(*configs)
    if choices.start == "stitched":
        stitched = stitcher(_in_memory(encoder, decoder, choices, dtype, seed))
        return Settled(choices, {"stitch": stitched.as_json()}, stitched.projections, None)
    if choices.encoder_mask is None and choices.starts_as_donor:
        has_tokenizer = decoder_donor.has_tokenizer
        if not has_tokenizer:
            warnings.warn(
                "the donor has no tokenizer, so how far its encoder can be opened cannot be measured: it stays causal. "
                "Choose encoder_mask, for example 'sink'",
                stacklevel=2,
            )
        choices = replace(choices, encoder_mask="auto" if has_tokenizer else "causal")
    is_auto, depth = choices.encoder_mask == "auto", choices.decoder_depth
    if not is_auto and depth is None:
        return Settled(choices, {}, None, None)
    measured = replace(
        choices, encoder_mask="causal" if is_auto else choices.encoder_mask, decoder_depth=None
    )
    is_donor_twice = decoder is None and choices.encoder_layers == choices.decoder_layers
    if is_donor_twice and depth is None and not keeps_pair:
        measured = replace(measured, tie_stacks=True)
    model = _in_memory(encoder, decoder, measured, dtype, seed)
    findings: dict[str, Any] = {}
    if is_auto:
        found = profile(model)
        findings["profile"] = found.as_json()
        share = found.chosen.future_share
        choices = replace(choices, encoder_mask=found.encoder_mask, future_share=share)
        model.set_encoder_mask(found.encoder_mask, future_share=share)
    if depth is None:
        return Settled(choices, findings, None, model if keeps_pair else None)
    chosen = choose(model, depth)
    findings["depth"] = chosen.as_json()
    fitted = None
    if refit is not None and not model.config.decoder.post_norms:
        mended = refit(model, chosen.layers)
        findings["refit"], fitted = mended.as_json(), mended.weights
    whole = choices.decoder_layers or range(model.config.decoder.num_hidden_layers)
    aligned = choices.aligned_layers
    choices = replace(
        choices,
        decoder_depth=None,
        decoder_layers=tuple(whole[i] for i in chosen.layers),
        aligned_layers=None if aligned is None else tuple(aligned[i] for i in chosen.layers),
    )
    return Settled(choices, findings, fitted, None)


def adapt_to_folder(
    encoder: str | Path,
    decoder: str | Path | None,
    out: str | Path,
    choices: Choices,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    watch: Callable[[Iterator[Initialised], Plan], Iterable[Initialised]] = lambda tensors, plan: tensors,
    profile: Profiler = profile_encoder,
    choose: DepthChooser = choose_decoder_layers,
    refit: Refitter | None = refit_decoder,
    stitcher: Stitcher = stitch,
) -> dict[str, Any]:
    """Make an encoder-decoder checkpoint, tensor by tensor, without ever holding a model in memory.

    Writes config.json, model.safetensors (or shards), the tokenizer, the card (README.md and history.json), and
    adaptation.json, which names for each tensor its source, rule and shape. Peak memory is that of the largest tensor;
    where the encoder's mask is measured that of the donor, with a `decoder_depth` or the stitched start that of the
    pair.

    Args:
        out: a folder that does not exist yet, unless `overwrite`.
        watch: wraps the stream of tensors, for a progress bar.
        The others are as for `adapt`.

    Returns:
        The report.

    Raises:
        FileExistsError: `out` exists; nothing was read or written.
        ValueError, FileNotFoundError: as for `adapt`; nothing is left behind.
    """
    with CheckpointWriter(out, overwrite=overwrite) as writer, ExitStack() as stack:
        # After the writer has found its place free: measuring takes minutes.
        choices, findings, fitted, _ = settle(
            encoder,
            decoder,
            choices,
            profile=profile,
            choose=choose,
            refit=refit,
            stitcher=stitcher,
            dtype=dtype,
            seed=seed,
        )
        job = stack.enter_context(open_adaptation(encoder, decoder, choices, dtype, seed, fitted))
        tensors = watch(job.tensors(), job.plan)
        writer.write_config(job.plan.config)
        writer.write_tensors(
            [(t.name, t.shape, job.dtype) for t in job.plan.tensors], ((t.name, x) for t, x in tensors)
        )
        if job.tokenizer is not None:
            copy_tokenizer(job.checkpoints["decoder"], writer.folder, job.tokenizer)
        report = job.report() | findings
        writer.write_card(History(origin=job.origin(findings)), job.plan.config)
        (writer.folder / "adaptation.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@dataclass
class Adaptation:
    """Open donors and the plan for them."""

    plan: Plan
    checkpoints: Mapping[Side, Checkpoint]
    donors: Mapping[Side, Donor]
    tokenizer: Any
    dtype: torch.dtype
    """Of all parameters of the pair."""
    seed: int
    fitted: Mapping[str, torch.Tensor] | None = None
    """See `initialise`."""

    def tensors(self) -> Iterator[Initialised]:
        """The pair's parameters, one by one."""
        return initialise(self.plan, self.donors, dtype=self.dtype, seed=self.seed, fitted=self.fitted)

    def origin(self, findings: Mapping[str, Any] | None = None) -> Origin:
        """What the card says of where the pair comes from; `findings` as from `settle`."""
        choices = self.plan.choices
        named = self.checkpoints["encoder"], self.checkpoints["decoder"]
        if named[0] is named[1]:
            donors: tuple[DonorRecord, ...] = (donor_of(named[0], "both"),)
        else:
            donors = donor_of(named[0], "encoder"), donor_of(named[1], "decoder")
        return Origin(
            kind="adapted",
            donors=donors,
            start=choices.start,
            cross_attention=_cross_attention_start(self.plan),
            encoder_layers=None if choices.encoder_layers is None else tuple(choices.encoder_layers),
            decoder_layers=None if choices.decoder_layers is None else tuple(choices.decoder_layers),
            fitted_tokens=_fitted_tokens(findings or {}),
            seed=self.seed,
            versions=versions(),
        )

    def report(self) -> dict[str, Any]:
        """What adaptation.json says: for each tensor where it came from."""
        choices = self.plan.choices
        tensors = {}
        for planned in self.plan.tensors:
            rule = planned.rule
            is_refit = rule.kind == "copy" and planned.name in (self.fitted or ())
            kind = "refit" if is_refit else rule.kind
            entry: dict[str, Any] = {"rule": kind, "shape": list(planned.shape)}
            if rule.side is not None and rule.donor_name is not None:
                entry["donor"] = rule.side
                entry["source"] = self.donors[rule.side].their_names[rule.donor_name]
            if rule.factor != 1.0:
                entry["factor"] = rule.factor
            tensors[planned.name] = entry
        return {
            "format": 1,
            "donors": {side: str(checkpoint.name) for side, checkpoint in self.checkpoints.items()},
            "start": choices.start,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "num_parameters": self.plan.num_parameters,
            "cross_attention": _cross_attention_start(self.plan),
            "unused_donor_tensors": unused_tensors(self.plan, self.donors),
            "tensors": tensors,
        }


def _fitted_tokens(findings: Mapping[str, Any]) -> int | None:
    fit = findings.get("stitch") or findings.get("refit")
    return None if fit is None else int(fit["tokens"])


def _cross_attention_start(plan: Plan) -> str:
    kinds = {t.rule.kind for t in plan.tensors if ".cross_attn." in t.name}
    if plan.config.source_projections == "own":
        return "merged into self-attention, projections of its own for the source: fitted in closed form"
    if not kinds:
        return "merged into self-attention: no parameters of its own"
    return "random: train it alone first" if "normal" in kinds else "copied from self-attention"


@contextmanager
def open_adaptation(
    encoder: str | Path,
    decoder: str | Path | None,
    choices: Choices,
    dtype: torch.dtype | None,
    seed: int,
    fitted: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Adaptation]:
    """Open one or two donors and plan their pair. The donors are closed on leaving.

    Args:
        dtype: None: that of the decoder donor.
        fitted: see `initialise`.
        The others are as for `adapt`.

    Raises:
        ValueError, FileNotFoundError: see `adapt`.
    """
    checkpoints: dict[Side, Checkpoint] = {"encoder": resolve(encoder)}
    checkpoints["decoder"] = resolve(decoder) if decoder is not None else checkpoints["encoder"]
    configs = {side: donor_family(c.config).read_config(c.config) for side, c in checkpoints.items()}
    is_pair = decoder is not None
    if is_pair and (reason := same_tokenizer(checkpoints["encoder"], checkpoints["decoder"])):
        raise ValueError(
            f"the donors have different tokenizers: {reason}. Encoder and decoder of a pair must share one "
            "vocabulary; choose two models of one family"
        )
    tokenizer = checkpoints["decoder"].tokenizer()
    plan = plan_adaptation(
        configs["encoder"],
        configs["decoder"] if is_pair else None,
        choices,
        adds_bos=_adds_bos(tokenizer, configs["decoder"].bos_token_id),
    )
    if plan.config.reads == "final" and choices.start == "lossless":
        warnings.warn("start='lossless' with reads='final' does not equal its donor", stacklevel=3)
    with ExitStack() as stack:
        encoder_source = stack.enter_context(checkpoints["encoder"].tensors())
        decoder_source = stack.enter_context(checkpoints["decoder"].tensors()) if is_pair else encoder_source
        sources = {"encoder": encoder_source, "decoder": decoder_source}
        donors: dict[Side, Donor] = {
            side: Donor(sources[side], donor_family(c.config), configs[side])
            for side, c in checkpoints.items()
        }
        yield Adaptation(plan, checkpoints, donors, tokenizer, dtype or donors["decoder"].dtype, seed, fitted)


def _adds_bos(tokenizer: Any, bos_token_id: int | None) -> bool:
    if tokenizer is None or bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == bos_token_id
