"""Teachers: what `LossModule` asks for a distribution in place of the right token.

A language model (`DecoderTeacher`) reads the raw text from left to right, whatever the student's objective made of
it, and predicts a token from those before it in the text:

- PrefixLM: from the source and the target so far.
- UL2, span corruption: a masked token from the text before it, masked or not. The published rule is teacher on real
  tokens and one-hot on sentinels (arXiv 2512.14856, ablations); it does not say what the teacher reads, so this is
  our choice: what a language model was trained to read.
- Supervised pairs: from source, the given part of the reply and the target so far.

It says nothing, and the right token counts alone, where it predicts nothing of the kind: for sentinels, for the stop
token at the end of a text (a donor's idea of an end is not the pair's stop token), and for the first token of a text
where the donor has no BOS. A chunk from the middle of a document is read like a text of its own, as the student reads
it.

Teachers are frozen, in eval mode, and held by plain objects, so that no module registers, trains or saves them.

N: scored positions. R: positions of raw text. E: width of the teacher. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from twofold.adapt.adaptation import open_adaptation
from twofold.adapt.initialise import initialise
from twofold.adapt.plan import Choices
from twofold.checkpoint import resolve
from twofold.checkpoint.load import load
from twofold.checkpoint.resolve import tokenizer_difference
from twofold.config import EncoderDecoderConfig, StackConfig
from twofold.config.distillation import DistillationConfig, HiddenStatesConfig
from twofold.data import Batch, Convention, Corpus
from twofold.data.targets import TargetReader, name_store
from twofold.data.teaching import RawRows, StoredTargets, Teaching
from twofold.models import EncoderDecoder
from twofold.models.encoder_decoder import LMHead, locate_tokens
from twofold.models.families import DONORS
from twofold.models.stack import Encoder, EncoderOutput
from twofold.train.loss import Matching, SparseTeacher, TeacherHead
from twofold.train.step import LossModule, Precision, TeacherOf


class DecoderTeacher:
    """A decoder-only model: a causal stack and its head."""

    matched_layers: tuple[int, ...] = ()
    """Whose hidden states it tells, see `Matching`."""

    def __init__(
        self, encoder: Encoder, config: EncoderDecoderConfig, head_weight_VE: Tensor, bos_token_id: int | None
    ) -> None:
        """Args:
        encoder: the stack, all masks causal.
        config: that it was made with.
        head_weight_VE: its LM head.
        bos_token_id: what its texts begin with, None where they begin with themselves.
        """
        self._encoder = encoder.eval().requires_grad_(False)
        self._config = config
        self.weight_VE = head_weight_VE.detach()
        self.softcap = config.decoder.final_logit_softcapping
        self.bos_token_id = bos_token_id

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weight_VE.device

    @property
    def max_length(self) -> int:
        """Tokens it can read at a time, BOS included."""
        return self._config.encoder.max_position_embeddings

    @property
    def stack(self) -> StackConfig:
        """What it is."""
        return self._config.encoder

    @torch.no_grad()
    def read(self, input_ids: Tensor, segment_ids: Tensor) -> EncoderOutput:
        """What its head reads after each token (`last_hidden_state`, [B, R, E]); hidden states where some are matched.

        Args:
            input_ids: int64 [B, R].
            segment_ids: int64 [B, R]; a segment is read alone, 0 is padding.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            tokens = locate_tokens(self._config, "encoder", input_ids, None, segment_ids)
            output: EncoderOutput = self._encoder(
                input_ids, tokens, output_hidden_states=bool(self.matched_layers)
            )
        return output

    def __call__(self, batch: Batch, scored: Tensor) -> TeacherHead:
        """What it says at the scored positions of a batch that has `RawRows`."""
        assert batch.teacher_input_ids is not None
        assert batch.teacher_segment_ids is not None
        assert batch.teacher_index is not None
        output = self.read(batch.teacher_input_ids, batch.teacher_segment_ids)
        index_N = batch.teacher_index.flatten()[scored]
        at = scored // batch.teacher_index.shape[1], index_N.clamp(min=0)
        hidden_NE = tuple(output.hidden_states[i][at] for i in self.matched_layers)
        return TeacherHead(
            output.last_hidden_state[at], self.weight_VE, self.softcap, index_N >= 0, hidden_NE
        )


class EncoderDecoderTeacher:
    """An encoder-decoder of the student's conventions: reads what the student reads, and speaks everywhere."""

    matched_layers: tuple[int, ...] = ()
    """Of its decoder, as for `DecoderTeacher`."""

    def __init__(self, model: EncoderDecoder) -> None:
        self._model = model.eval().requires_grad_(False)

    @property
    def stack(self) -> StackConfig:
        """Its decoder."""
        return self._model.config.decoder

    @torch.no_grad()
    def __call__(self, batch: Batch, scored: Tensor) -> TeacherHead:
        """What it says at the scored positions of a batch."""
        with torch.autocast(scored.device.type, enabled=False):
            states_BTE, _, hidden_BTE = self._model.states(
                input_ids=batch.input_ids,
                segment_ids=batch.segment_ids,
                decoder_input_ids=batch.decoder_input_ids,
                decoder_segment_ids=batch.decoder_segment_ids,
                output_hidden_states=bool(self.matched_layers),
            )
        head = self._model.lm_head
        speaks_N = torch.ones_like(scored, dtype=torch.bool)
        return TeacherHead(
            states_BTE.flatten(0, 1)[scored],
            head.out_proj.weight.detach(),
            head.softcap,
            speaks_N,
            tuple(hidden_BTE[i].flatten(0, 1)[scored] for i in self.matched_layers),
        )


def stored_teacher(batch: Batch, scored: Tensor) -> SparseTeacher:
    """What a teacher said earlier: the entries of a batch that has `StoredTargets`."""
    assert batch.teacher_token_ids is not None
    assert batch.teacher_shares is not None
    assert len(batch.teacher_token_ids) == len(scored)
    shares_NK = batch.teacher_shares.float()
    total_N1 = shares_NK.sum(dim=1, keepdim=True)
    # They were rounded to float16, so they sum to 1 only nearly.
    shares_NK = shares_NK / torch.where(total_N1 > 0, total_N1, 1.0)
    return SparseTeacher(batch.teacher_token_ids.long(), shares_NK)


@dataclass(frozen=True, slots=True)
class Distillation:
    """The parts of a run that a teacher adds."""

    teacher: TeacherOf
    share: float
    teaching: Callable[[Sequence[Corpus]], Teaching | None]
    """What the training loader adds to its batches, given its corpora."""
    vocab_size: int | None = None
    """Embeddings of a teacher that reads the student's inputs; None for others."""
    matching: Matching | None = None

    def objective(self, model: EncoderDecoder, precision: Precision) -> LossModule:
        """What a step minimises."""
        return LossModule(
            model, precision, teacher=self.teacher, teacher_share=self.share, matching=self.matching
        )

    def check(self, student: EncoderDecoder) -> None:
        """Refuse a student whose inputs the teacher cannot read; after its sentinels were added.

        Raises:
            ValueError: says why.
        """
        size = student.config.decoder.vocab_size
        if self.vocab_size is not None and self.vocab_size < size:
            raise ValueError(
                f"the student's vocabulary has {size} entries (sentinels may have been added), the teacher's "
                f"{self.vocab_size}, so it cannot read all of the student's inputs; use a decoder-only teacher, or "
                "one that was trained with these sentinels"
            )


def open_distillation(
    config: DistillationConfig,
    student: EncoderDecoder,
    *,
    pad_multiple: int,
    max_raw_length: int,
    precision: Precision,
    device: torch.device,
) -> Distillation:
    """Check that a teacher goes with a student, and load it.

    Every process holds the whole teacher, also where the student is sharded.

    Args:
        config: a teacher, or stored targets.
        student: with its tokenizer.
        pad_multiple: see `DataConfig`.
        max_raw_length: tokens of the longest raw text.
        precision: of the run; the teacher's weights have this dtype.
        device: of the run.

    Raises:
        FileNotFoundError: no such teacher or targets.
        ValueError: another tokenizer, other conventions, or texts longer than the teacher reads; says which.
    """
    if config.targets is not None:
        folder = config.targets
        size = student.config.decoder.vocab_size

        def stored(corpora: Sequence[Corpus]) -> Teaching:
            reader = TargetReader(folder, [name_store(c.store, c.source.path) for c in corpora if len(c)])
            if reader.header.vocab_size > size:
                raise ValueError(
                    f"the targets in {folder} name tokens of a vocabulary of {reader.header.vocab_size}, the "
                    f"student's has {size}; make them with this student"
                )
            return StoredTargets(reader)

        return Distillation(stored_teacher, config.share, stored)
    assert config.teacher is not None
    checkpoint = resolve(config.teacher)
    is_decoder = checkpoint.config.get("model_type") in DONORS
    if config.kind != "auto" and (config.kind == "decoder") != is_decoder:
        actual = "decoder" if is_decoder else "encoder_decoder"
        raise ValueError(
            f"{config.teacher} is of model_type {checkpoint.config.get('model_type')!r}, so its kind is {actual!r}, "
            f"got kind={config.kind!r}"
        )
    check_tokenizer(config.teacher, checkpoint.tokenizer(), student.tokenizer)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if is_decoder:
        vocab_size = student.config.decoder.vocab_size
        teacher = open_decoder_teacher(
            config.teacher, dtype=dtype, device=device, max_length=max_raw_length, vocab_size=vocab_size
        )
        rows = RawRows(teacher.bos_token_id, pad_multiple)
        matching = match(student.config, teacher, config.hidden_states)
        return Distillation(teacher, config.share, lambda corpora: rows, matching=matching)
    model = load(config.teacher, dtype=dtype, device=device, skip_vision=True)
    _check_conventions(config.teacher, Convention.of(model.config), Convention.of(student.config))
    reader = EncoderDecoderTeacher(model)
    matching = match(student.config, reader, config.hidden_states)
    vocab_size = model.config.decoder.vocab_size
    return Distillation(reader, config.share, lambda corpora: None, vocab_size, matching)


def match(
    student: EncoderDecoderConfig,
    teacher: DecoderTeacher | EncoderDecoderTeacher,
    config: HiddenStatesConfig | None,
) -> Matching | None:
    """Let a teacher tell the hidden states that a student's are to be drawn to.

    Raises:
        ValueError: unequal widths, or layers that one of both does not have.
    """
    if config is None:
        return None
    own, theirs = student.decoder, teacher.stack
    if own.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"hidden_states compares vectors of one width, but the student's decoder has {own.hidden_size} and the "
            f"teacher {theirs.hidden_size}; remove distillation.hidden_states"
        )
    pairs = config.layers
    if pairs is None:
        pairs = layer_pairs(student, theirs.num_hidden_layers)
    bad = [
        pair
        for pair in pairs
        if not (0 <= pair[0] <= own.num_hidden_layers and 0 <= pair[1] <= theirs.num_hidden_layers)
    ]
    if bad or not pairs:
        raise ValueError(
            f"distillation.hidden_states.layers must be pairs of a decoder layer from 0 to {own.num_hidden_layers} and "
            f"a teacher's from 0 to {theirs.num_hidden_layers} (the last is the output), got {list(bad or pairs)}"
        )
    teacher.matched_layers = tuple(layer for _, layer in pairs)
    return Matching(tuple(layer for layer, _ in pairs), config.weight)


def layer_pairs(student: EncoderDecoderConfig, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """What each decoder layer is drawn to: see `HiddenStatesConfig.layers`. The first layers read embeddings, which
    need no teacher."""
    depth = student.decoder.num_hidden_layers
    if student.aligned_layers is not None and student.encoder.num_hidden_layers == teacher_depth:
        inner = student.aligned_layers[1:]
    else:
        inner = tuple(round(i * teacher_depth / depth) for i in range(1, depth))
    return (*enumerate(inner, start=1), (depth, teacher_depth))


def open_decoder_teacher(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    vocab_size: int,
) -> DecoderTeacher:
    """Read a decoder-only checkpoint: only what it has of itself, once.

    Args:
        name: a folder, a hub name or a GGUF file.
        max_length: tokens of the longest text it will be given, without BOS.
        vocab_size: the student's. Rows of the teacher's head beyond it are padding of the table and are cut.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a decoder-only model, or one that cannot read texts so long.
    """
    # The lossless start keeps the donor as it is, and knows whether its texts begin with BOS.
    choices = Choices(start="lossless", encoder_mask="causal")
    with open_adaptation(name, None, choices, dtype, seed=0) as adaptation:
        paired = adaptation.plan.config
        bos = paired.bos_token_id if paired.source_bos else None
        limit = paired.encoder.max_position_embeddings
        if max_length + (bos is not None) > limit:
            raise ValueError(
                f"the teacher {name} reads {limit} tokens, BOS included, the run has texts of up to {max_length}; "
                "lower data.source_length or data.target_length"
            )
        # Only the stack and the head: nobody reads what the layers of a decoder would.
        config = paired.model_copy(update={"reads": "final", "aligned_layers": None})
        with torch.device("meta"):
            teacher = nn.ModuleDict({"encoder": Encoder(config), "lm_head": LMHead(config.decoder)})
        own = {t.name: t.name.removeprefix("model.") for t in adaptation.plan.tensors}
        plan = replace(
            adaptation.plan,
            tensors=tuple(
                t for t in adaptation.plan.tensors if own[t.name].startswith(("encoder.", "lm_head."))
            ),
        )
        tensors = initialise(plan, adaptation.donors, dtype=dtype, seed=0)
        state = {own[planned.name]: tensor.to(device) for planned, tensor in tensors}
    encoder, head = teacher["encoder"], teacher["lm_head"]
    assert isinstance(encoder, Encoder)
    assert isinstance(head, LMHead)
    teacher.load_state_dict(state, assign=True, strict=False)
    if config.tie_word_embeddings != "none":
        head.out_proj.weight = encoder.embed_tokens.weight
    assert not any(p.is_meta for p in teacher.parameters()), "the plan left a parameter without a value"
    return DecoderTeacher(encoder, config, head.out_proj.weight[:vocab_size], bos)


def check_tokenizer(name: str | Path, teacher: object, student: object) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Raises:
        ValueError: says why.
    """
    if teacher is None or student is None:
        raise ValueError(
            f"teacher {name} and student can be compared only where both have tokenizer files, and "
            f"{'the teacher' if teacher is None else 'the student'} has none; copy them into its folder"
        )
    if reason := tokenizer_difference(str(name), teacher, "the student", _Without(student, teacher)):
        raise ValueError(
            f"teacher and student have different tokenizers: {reason}. A teacher's distribution is over the student's "
            "tokens; choose one of the same family"
        )


class _Without:
    """A student's tokenizer without the sentinels that were added behind the teacher's tokens."""

    def __init__(self, student: object, teacher: object) -> None:
        self._student = student
        last = max(teacher.get_vocab().values(), default=-1)  # type: ignore[attr-defined]
        vocab = student.get_vocab()  # type: ignore[attr-defined]
        self._vocab = {token: i for token, i in vocab.items() if i <= last}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def __getattr__(self, name: str) -> object:
        return getattr(self._student, name)


def _check_conventions(name: str, teacher: Convention, student: Convention) -> None:
    def of_texts(convention: Convention) -> dict[str, object]:
        return {
            field: getattr(convention, field)
            for field in ("decoder_start", "bos_token_id", "source_bos", "stop_token_ids")
        }

    theirs, ours = of_texts(teacher), of_texts(student)
    if theirs != ours:
        differing = ", ".join(
            f"{key} is {theirs[key]} and {ours[key]}" for key in ours if theirs[key] != ours[key]
        )
        raise ValueError(
            f"the encoder-decoder {name} and the student have different conventions ({differing}), so it cannot read "
            "the student's inputs; use a decoder-only teacher, or a student adapted the same way"
        )
