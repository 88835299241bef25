"""`Backend` on OpenVINO's CPU plugin: linear layers there, attention of decoding steps in `ragged`, and steps of a few
rows in `narrow` as a whole.

Letters: R rows of one request, M tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.infer.backends.base import DecoderRun, Floats, Held, Precision, Start
from twofold.infer.backends.jit import StoredDtype
from twofold.infer.backends.narrow import NarrowDecoder
from twofold.infer.backends.openvino.compiling import Compiler
from twofold.infer.backends.openvino.decoder import DecoderChain
from twofold.infer.backends.openvino.encoder import EncoderGraph
from twofold.infer.backends.openvino.lower import Lowering, WeightFormat
from twofold.infer.backends.ragged import (
    OWN_INDEX,
    SOURCE_COLUMNS,
    Columns,
    Layout,
    attend,
    limited_threads,
)
from twofold.infer.padding import padded
from twofold.models import EncoderDecoder
from twofold.models.attention import Attention
from twofold.models.masks import decoder_rule


@dataclass(frozen=True, slots=True)
class _Formats:
    """What a precision stands for."""

    weights: WeightFormat
    narrow: StoredDtype | None
    """Of calls with few tokens; None: they are run as all others."""
    cache: StoredDtype
    settings: dict[str, Any]
    """Of OpenVINO's CPU plugin."""


_ROUNDED_INPUTS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
"""Matrices in few bits are multiplied with inputs in int8, one scale for 64 neighbours. On 2 cores of an EPYC (Zen 4),
B-B shapes, that takes 250 ms for 512 source tokens where bfloat16 takes 310 to 600, and 12.6 ms for a step of 8 rows in
place of 13.9; it changes what the encoder gives no more than bfloat16 does (both 4.4% on random weights)."""

_FORMATS: dict[Precision, _Formats] = {
    "float32": _Formats("float", "float32", "float32", {"INFERENCE_PRECISION_HINT": "f32"}),
    "bfloat16": _Formats("float", "bfloat16", "bfloat16", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "int8": _Formats("int8", "int8", "int8", _ROUNDED_INPUTS),
    "int4": _Formats("int4", None, "int8", _ROUNDED_INPUTS),
}


_NARROW_TOKENS = 3
"""Up to so many tokens a call is run by `NarrowDecoder`, which takes as long as the matrices take to be read. One token
of B-B shapes, 2 cores of an EPYC (Zen 5), OpenVINO and that: 6.3 and 3.7 ms in int8, 9.7 and 6.8 in bfloat16, 14.7 and
12.4 in float32; they are level at four tokens."""


class OpenVinoBackend:
    """Runs an `EncoderDecoder` on the CPU.

    The model itself stays for its embeddings and for sources too long for `EncoderGraph`. OpenVINO multiplies with
    matrices in an order of its own, which it makes when they are first used, and in float formats out of the memory of
    the model's float32 matrices: a model that is changed in place needs a new backend.

    Args:
        model: on the CPU, in evaluation mode.
        precision: `float32`: equal to the model but for rounding. `bfloat16`: matrices, products and cache in bfloat16,
            where the processor has instructions for it. `int8`, `int4`: matrices in that many bits, the head included;
            what they multiply, and the cache, in int8; everything else in float32.
        threads: of the processor. None: as many as it has cores.
    """

    def __init__(self, model: EncoderDecoder, precision: Precision, threads: int | None = None) -> None:
        self._model, config, formats = model, model.config, _FORMATS[precision]
        self.can_verify, self._threads = True, threads
        settings = formats.settings | {"NUM_STREAMS": 1}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        lowering = Lowering(formats.weights)
        with Compiler(settings, threads) as compiler:
            self._encoder = EncoderGraph(model, lowering, compiler)
            self._decoder = DecoderChain(model, lowering, compiler)
        self._narrow = None if formats.narrow is None else NarrowDecoder(model, formats.narrow)
        self._n_narrow = _NARROW_TOKENS
        decoder = config.decoder
        self._layout = Layout(
            decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim, formats.cache
        )
        self._windows = {t: decoder_rule(decoder, t).past for t in dict.fromkeys(decoder.layer_types)}
        self._continues = config.decoder_positions == "continue"

    def bytes_needed(self, start: Start) -> int:
        """See `Backend`."""
        columns = len(start.source_ids) + start.n_rows * start.n_tokens + start.n_verified
        return self._layout.bytes_per_column * columns

    @torch.no_grad()
    def start(self, starts: Sequence[Start]) -> list[tuple[Held, Tensor]]:
        """See `Backend`."""
        sources = self._sources([start.source_ids for start in starts])
        held = [HeldColumns(self._layout, start, s) for start, s in zip(starts, sources, strict=True)]
        taken = [(request, 0, start.prefix_ids) for request, start in zip(held, starts, strict=True)]
        logits_MV = self._run(taken)
        last = np.cumsum([len(start.prefix_ids) for start in starts]) - 1
        found: list[tuple[Held, Tensor]] = []
        for request, start, place in zip(held, starts, last.tolist(), strict=True):
            request.n_tokens = len(start.prefix_ids)
            for row in request.rows[1:]:
                row.copy_from(request.rows[0], request.n_tokens)
            found.append((request, logits_MV[place].clone()))
        return found

    @torch.no_grad()
    def step(self, held: Sequence[Held], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Backend`."""
        requests = cast(Sequence[HeldColumns], held)
        logits_MV = self._run(
            [
                (request, row, [token])
                for request, newest in zip(requests, tokens, strict=True)
                for row, token in enumerate(newest)
            ]
        )
        for request in requests:
            request.n_tokens += 1
        return list(torch.split_with_sizes(logits_MV, [request.n_rows for request in requests]))

    @torch.no_grad()
    def verify(self, held: Held, tokens: Sequence[int]) -> Tensor:
        """See `Backend`."""
        return self._run([(cast(HeldColumns, held), 0, tokens)])

    def _sources(self, sources: Sequence[Sequence[int]]) -> list[Columns]:
        """Encode, and keep what each source's decoder layers read."""
        input_ids, is_real = padded(sources, "right", torch.device("cpu"))
        more = padded_length(input_ids.shape[1]) - input_ids.shape[1]
        input_ids, is_real = F.pad(input_ids, (0, more)), F.pad(is_real, (0, more))
        if self._encoder.fits(*input_ids.shape):
            by_layer = self._encoder.run(input_ids, is_real)
        else:
            by_layer = _plainly_encoded(self._model, input_ids, is_real)
        kept = [Columns(self._layout, len(source)) for source in sources]
        for layer, (keys_BKHS, values_BKSH) in enumerate(by_layer):
            for row, columns in enumerate(kept):
                n = columns.n_columns
                columns.fill(layer, keys_BKHS[row, :, :, :n], values_BKSH[row, :, :n])
        return kept

    def _run(self, taken: Sequence[tuple[HeldColumns, int, Sequence[int]]]) -> Tensor:
        """Logits [M, V] of tokens, each of a request's row, behind the `n_tokens` that it has taken in."""
        ids = [token for _, _, tokens in taken for token in tokens]
        tables = {layer_type: self._table(taken, window) for layer_type, window in self._windows.items()}
        any_table = next(iter(tables.values()))
        positions = torch.from_numpy(any_table[:, OWN_INDEX].copy())
        if self._continues:
            positions += torch.from_numpy(any_table[:, SOURCE_COLUMNS])
        layer_types = self._model.config.decoder.layer_types

        def attend_kept(
            layer: int, attention: Attention, q: Floats, new: tuple[Floats, Floats] | None, out: Floats
        ) -> None:
            attend(
                q,
                new,
                tables[layer_types[layer]],
                layer,
                self._layout,
                out,
                reads_source=new is None or self._model.decoder.is_merged,
                scale=attention.scale,
                softcap=attention.softcap,
            )

        runs: DecoderRun = self._decoder
        if self._narrow is not None and len(ids) <= self._n_narrow:
            runs = self._narrow
        with limited_threads(self._threads):
            return runs.run(torch.tensor(ids), positions, attend_kept)

    def _table(
        self, taken: Sequence[tuple[HeldColumns, int, Sequence[int]]], past: int | None
    ) -> npt.NDArray[np.int64]:
        """See `ragged.SOURCE_DATA` and those after it; `past`: how many tokens back the layer's window reaches."""
        rows = []
        covers_source = self._model.config.window_covers_source
        for request, row, tokens in taken:
            source, own = request.source, request.rows[row]
            n_source = source.n_columns
            assert request.n_tokens + len(tokens) <= own.n_columns  # kernels write where they are told
            for index in range(request.n_tokens, request.n_tokens + len(tokens)):
                first_source = first_own = 0
                if past is not None:
                    first_own = max(0, index - past)
                    if covers_source:
                        first_source = min(n_source, max(0, n_source + index - past))
                rows.append(
                    (
                        *source.addresses,
                        n_source,
                        first_source,
                        *own.addresses,
                        own.n_columns,
                        first_own,
                        index,
                    )
                )
        return np.array(rows, np.int64)


class HeldColumns:
    """`Held`: the source's keys and values, and those of each row.

    Attributes:
        source: of all rows.
        rows: one for each row; token i in column i.
        n_tokens: decoder tokens taken in so far.
    """

    def __init__(self, layout: Layout, start: Start, source: Columns) -> None:
        self.source = source
        self.rows = [Columns(layout, start.n_tokens + start.n_verified) for _ in range(start.n_rows)]
        self.n_tokens = 0

    @property
    def n_rows(self) -> int:
        """See `Held`."""
        return len(self.rows)

    @property
    def n_bytes(self) -> int:
        """See `Held`."""
        return self.source.n_bytes + sum(row.n_bytes for row in self.rows)

    def select(self, rows: Sequence[int]) -> None:
        """See `Held`. A row that goes on once keeps its memory; only a second copy of it is copied."""
        free = [self.rows[i] for i in set(range(len(self.rows))) - set(rows)]
        chosen: list[Columns] = []
        seen: set[int] = set()
        for i in rows:
            row = self.rows[i]
            if i in seen:
                copy = free.pop() if free else Columns(row.layout, row.n_columns)
                copy.copy_from(row, self.n_tokens)
                row = copy
            seen.add(i)
            chosen.append(row)
        self.rows = chosen

    def accept(self, n: int) -> None:
        """See `Held`: what was guessed wrong lies behind, and is overwritten."""
        self.n_tokens += n


def padded_length(n_source: int) -> int:
    """Of sources that are read together: 8 lengths from any one to its double, at most an eighth more than asked for.

    OpenVINO keeps what it has prepared for every shape that it has seen, 0.7 MB for each of B-B's: over 20 minutes of
    requests of any lengths a server grew by 1 GB.
    """
    step = max(8, 1 << max(0, n_source.bit_length() - 4))
    return -(-n_source // step) * step


def _plainly_encoded(
    model: EncoderDecoder, input_ids: Tensor, is_real: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What `EncoderGraph.run` gives, by the model's own modules, which need less memory and more time."""
    encoded = model.encode(input_ids, is_real)
    return [
        (kept.keys.float().transpose(2, 3), kept.values.float())
        for kept in model.decoder.read_source(encoded)
    ]
