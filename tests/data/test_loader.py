import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.config.data import DataConfig
from twofold.data.convention import Convention, Example
from twofold.data.examples import ExampleCounts, ExampleMaker, mixture_of, required_sentinels
from twofold.data.loader import Loader
from twofold.objectives.sentinels import find_sentinels
from twofold.objectives.span_corruption import restore

END = 257  # <|im_end|>
BOS = 258
LOSSLESS = Convention(
    decoder_start="last_source_token",
    bos_token_id=256,
    source_bos=False,
    stop_token_ids=(END,),
    pad_token_id=END,
)
PUBLISHED = Convention(
    decoder_start="bos", bos_token_id=BOS, source_bos=True, stop_token_ids=(END,), pad_token_id=0
)
DOCUMENTS = [{"text": "".join(chr(97 + (i + j) % 26) for j in range(3 + 7 * i))} for i in range(6)]


def config(objective="prefix_lm", **changes):
    named = {"name": objective} if isinstance(objective, str) else objective
    if named["name"] == "supervised":
        source = {"path": "a.jsonl", "prompt_field": "p", "completion_field": "c"}
    else:
        source = {"path": "a.txt"}
    lengths = {"source_length": 16, "target_length": 16, "rows_per_batch": 2}
    return DataConfig(**{"sources": [source], "objective": named, **lengths, **changes})


def sentinels(tokenizer):
    return find_sentinels(tokenizer.get_vocab(), 40)


def loader(tokenizer, *args, records=DOCUMENTS, convention=LOSSLESS, **changes):
    return Loader([records], tokenizer, config(*args, **changes), convention, sentinels(tokenizer))


def as_lists(batch):
    return [getattr(batch, name).tolist() for name in batch.__dataclass_fields__]


OBJECTIVES = [
    {"name": "prefix_lm"},
    {"name": "prefix_lm", "split": "uniform"},
    {"name": "span_corruption"},
    {"name": "ul2", "preset": "t5gemma2"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["name"] + o.get("split", ""))
@pytest.mark.parametrize("packing", [True, False])
def test_resuming_gives_the_run_that_never_stopped(tokenizer, objective, packing):
    straight = loader(tokenizer, objective, packing=packing)
    states, batches = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(as_lists(next(straight)))
    assert straight.epoch >= 1
    for position, state in enumerate(states):
        resumed = loader(tokenizer, objective, packing=packing)
        resumed.load_state_dict(state)
        assert [as_lists(next(resumed)) for _ in range(14 - position)] == batches[position:]
        assert resumed.counts == straight.counts


def test_state_of_other_data_is_refused(tokenizer):
    state = loader(tokenizer).state_dict()
    with pytest.raises(ValueError, match="has seed 0, this run has 1"):
        loader(tokenizer, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has num_documents 6, this run has 5"):
        loader(tokenizer, records=DOCUMENTS[:5]).load_state_dict(state)
    with pytest.raises(ValueError, match="has shuffle True, this run has False"):
        loader(tokenizer, shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="fewer than the 9 examples that were read"):
        loader(tokenizer).load_state_dict({**state, "offset": 9})


def text_of(tokenizer, batch, row):
    """The text of a row that holds one example of running text."""
    source = batch.input_ids[row][batch.segment_ids[row] > 0].tolist()
    decoder = batch.decoder_input_ids[row][batch.decoder_segment_ids[row] > 0].tolist()
    label = batch.labels[row][batch.labels[row] != -100].tolist()[-1]
    return tokenizer.decode([i for i in [*source, *decoder, label] if i not in (BOS, END)])


@pytest.mark.parametrize("convention", [LOSSLESS, PUBLISHED], ids=["lossless", "published"])
@pytest.mark.parametrize("split", ["half", "uniform"])
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(min_size=2, max_size=60), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_prefix_lm_rows_decode_to_the_text(tokenizer, convention, split, texts, seed):
    records = [{"text": text} for text in texts]
    made = loader(
        tokenizer,
        {"name": "prefix_lm", "split": split},
        records=records,
        convention=convention,
        packing=False,
        rows_per_batch=1,
        source_length=200,
        target_length=200,
        seed=seed,
    )
    assert [text_of(tokenizer, batch, 0) for batch in made.one_pass()] == texts


@pytest.mark.parametrize("convention", [LOSSLESS, PUBLISHED], ids=["lossless", "published"])
@pytest.mark.parametrize("objective", OBJECTIVES[2:], ids=lambda o: o["name"])
@settings(max_examples=15, deadline=None)
@given(text=st.text(min_size=2, max_size=60), seed=st.integers(0, 99))
def test_denoised_rows_restore_to_the_text(tokenizer, convention, objective, text, seed):
    made = loader(
        tokenizer,
        objective,
        records=[{"text": text}],
        convention=convention,
        packing=False,
        rows_per_batch=1,
        source_length=120,
        target_length=120,
        seed=seed,
    )
    joined = []
    for batch in made.one_pass():
        source = batch.input_ids[0][batch.segment_ids[0] > 0].tolist()
        prefix_len = int((batch.labels[0] == -100).sum()) + 1
        prefix = batch.decoder_input_ids[0, :prefix_len].tolist()
        source = source[1:] if convention is PUBLISHED else source + prefix
        target = batch.labels[0][batch.labels[0] != -100].tolist()
        target = target[:-1] if target[-1] == END else target
        marks = sentinels(tokenizer)
        if set(source) & set(marks):
            joined += restore(np.asarray(source), np.asarray(target), marks).tolist()
        else:
            joined += source + target
    assert tokenizer.decode(joined) == text


def maker(tokenizer, *args, convention=LOSSLESS, **changes):
    return ExampleMaker(tokenizer, config(*args, **changes), convention, sentinels(tokenizer))


def examples(tokenizer, record, *args, counts=None, **changes):
    rng = np.random.default_rng(0)
    return list(maker(tokenizer, *args, **changes).examples(record, rng, counts or ExampleCounts()))


@pytest.mark.parametrize(
    ("convention", "source_len"), [(LOSSLESS, 14), (PUBLISHED, 16)], ids=["lossless", "published"]
)
def test_half_cuts_fill_the_row_exactly(tokenizer, convention, source_len):
    # A target of 15 and room for a stop token; its source half of 15 gains a BOS or gives a token to the
    # decoder.
    first, last = examples(tokenizer, {"text": "x" * 60}, convention=convention)
    assert (len(first.source), len(first.target), first.ends) == (source_len, 15, False)
    assert (last.decoder_length, last.target[-1], last.ends) == (16, END, True)


@pytest.mark.parametrize("convention", [LOSSLESS, PUBLISHED], ids=["lossless", "published"])
def test_a_short_source_is_filled_exactly_too(tokenizer, convention):
    first, *_ = examples(tokenizer, {"text": "x" * 60}, convention=convention, source_length=8)
    assert len(first.source) == 8


def test_spans_always_stop_and_a_cut_suffix_does_not(tokenizer):
    spans = examples(tokenizer, {"text": "abcdefghij" * 5}, "span_corruption")
    assert len(spans) > 1
    assert all(example.ends and example.target[-1] == END for example in spans)
    suffix = {"name": "ul2", "denoisers": [({"kind": "suffix", "noise_density": 0.5}, 1)]}
    cuts = examples(tokenizer, {"text": "abcdefghij" * 5}, suffix)
    assert [example.ends for example in cuts] == [False, True]


def test_mode_token_may_be_several_tokens(tokenizer, ids):
    only_s = {
        "name": "ul2",
        "denoisers": [({"kind": "suffix", "noise_density": 0.5, "mode_token": "[S]"}, 1)],
    }
    (example,) = examples(tokenizer, {"text": "abcd"}, only_s)
    assert [*example.source.tolist(), *example.decoder_prefix.tolist()] == ids("[S]ab")


def test_sentinels_are_counted_before_the_run(tokenizer):
    wanted = config("span_corruption", source_length=512, target_length=512)
    # LOSSLESS gives one source token to the decoder: a source budget of 513, so 570 raw tokens, 86 noise, 29
    # spans.
    assert required_sentinels(tokenizer, wanted, LOSSLESS) == 29
    assert required_sentinels(tokenizer, config(), LOSSLESS) == 0
    with pytest.raises(
        ValueError, match=r"'span_corruption' needs 29 sentinels for chunks of 570 tokens, got 28"
    ):
        Loader([DOCUMENTS], tokenizer, wanted, LOSSLESS, sentinels(tokenizer)[:28] * 2)
    assert (
        next(Loader([DOCUMENTS], tokenizer, wanted, LOSSLESS, sentinels(tokenizer)[:29])).num_scored_tokens
        > 0
    )
    published = config({"name": "ul2", "preset": "t5gemma2"})
    assert len(mixture_of(published)) == 5


def test_order_is_a_new_permutation_each_epoch(tokenizer):
    records = [{"text": letter * 4} for letter in "abcdefgh"]
    made = loader(tokenizer, records=records, packing=False, rows_per_batch=8)
    orders = [[text_of(tokenizer, batch, row)[0] for row in range(8)] for batch in itertools.islice(made, 2)]
    assert [sorted(order) for order in orders] == [list("abcdefgh")] * 2
    assert orders[0] != orders[1]
    assert orders[0] != list("abcdefgh")
    straight = loader(tokenizer, records=records, packing=False, rows_per_batch=8, shuffle=False)
    assert [text_of(tokenizer, next(straight), row)[0] for row in range(8)] == list("abcdefgh")


SPANS = {"name": "span_corruption", "noise_density": 0.5, "mean_span_length": 2}


def test_noise_of_a_document_does_not_depend_on_the_others(tokenizer):
    def noise(records, document, seed=0):
        made = loader(tokenizer, SPANS, records=records, packing=False, rows_per_batch=1, seed=seed)
        return as_lists(list(made.one_pass())[document])

    long = {"text": "abcdefghijklmn"}
    assert noise([{"text": "xy"}, long], 1) == noise([{"text": "some"}, long], 1)
    assert noise([long, long], 0) != noise([long, long], 1)
    assert len({str(noise([long], 0, seed)) for seed in range(8)}) > 1


def test_epochs_differ_in_noise(tokenizer):
    made = loader(tokenizer, SPANS, records=[{"text": "abcdefghijklmn"}], packing=False, rows_per_batch=1)
    assert len({str(as_lists(next(made))) for _ in range(8)}) > 1


def test_counts(tokenizer):
    records = [{"text": "abcd"}, {"text": "efgh"}]
    made = loader(tokenizer, records=records, packing=False, rows_per_batch=1)
    next(made)
    next(made)
    next(made)
    assert (made.counts.documents, made.counts.examples, made.counts.batches) == (2, 3, 3)
    assert made.counts.scored_tokens == 9  # two letters and a stop token each


def test_one_pass_is_finite_repeatable_and_leaves_the_run_alone(tokenizer):
    made, other = loader(tokenizer), loader(tokenizer)
    next(made), next(other)
    first = [as_lists(batch) for batch in made.one_pass()]
    assert first == [as_lists(batch) for batch in made.one_pass()]
    assert as_lists(next(made)) == as_lists(next(other))
    scored = sum(batch.num_scored_tokens for batch in made.one_pass())
    # By hand: 3, 10, 17, 24, 31, 38 letters in chunks of 30 whose second half is scored, and six stop
    # tokens; the single letter left of 31 is dropped, and its text does not end.
    assert scored == 2 + 5 + 9 + 12 + 15 + (15 + 4) + 5


def test_packed_rows_have_fixed_shapes(tokenizer):
    made = loader(tokenizer)
    for _ in range(5):
        batch = next(made)
        assert batch.input_ids.shape == (2, 16)
        assert batch.labels.shape == (2, 16)
    assert int(batch.segment_ids.max()) >= 1


def test_several_sources_are_one_corpus(tokenizer):
    made = Loader(
        [[{"text": "aa"}], [], [{"text": "bb"}, {"text": "cc"}]],
        tokenizer,
        config(packing=False, rows_per_batch=3),
        LOSSLESS,
    )
    (batch,) = made.one_pass()
    assert [text_of(tokenizer, batch, row) for row in range(3)] == ["aa", "bb", "cc"]


def test_corpora_without_examples(tokenizer):
    with pytest.raises(ValueError, match="no documents to read"):
        Loader([[]], tokenizer, config(), LOSSLESS)
    nothing = loader(tokenizer, records=[{"text": ""}, {"text": "a"}])
    with pytest.raises(ValueError, match="none of 2 documents gave an example"):
        next(nothing)
    with pytest.raises(ValueError, match="none of 2 documents gave an example"):
        list(nothing.one_pass())


def test_rows_too_short(tokenizer):
    with pytest.raises(ValueError, match="0 target tokens"):
        loader(tokenizer, target_length=1)


LONG = {"prompt": "p" * 40, "completion": "c" * 30}
SHORT = {"prompt": "p", "completion": "c"}
PAIR_LENGTHS = {"source_length": 40, "target_length": 25}


def test_long_pairs_are_an_error_by_default(tokenizer):
    made = loader(tokenizer, "supervised", records=[SHORT, LONG], shuffle=False, **PAIR_LENGTHS)
    # "<|im_start|>user\n" is 6 tokens, "<|im_end|>\n" 2, the header "<|im_start|>assistant\n" 11.
    with pytest.raises(ValueError, match=r"document 1 of source 0: a pair of 48 source and 41 target tokens"):
        list(made.one_pass())


def test_long_pairs_can_be_skipped(tokenizer):
    changes = {"packing": False, "rows_per_batch": 1, "shuffle": False, "max_length_action": "skip"}
    changes = {**changes, **PAIR_LENGTHS, "records": [LONG, SHORT]}
    made = loader(tokenizer, "supervised", **changes)
    next(made)
    assert (made.counts.skipped, made.counts.examples) == (1, 1)
    resumed = loader(tokenizer, "supervised", **changes)
    resumed.load_state_dict(made.state_dict())
    assert resumed.counts == made.counts


@pytest.mark.parametrize("convention", [LOSSLESS, PUBLISHED], ids=["lossless", "published"])
def test_truncation_keeps_the_end_of_the_source_and_the_start_of_the_target(tokenizer, ids, convention):
    counts = ExampleCounts()
    (example,) = examples(
        tokenizer,
        LONG,
        "supervised",
        counts=counts,
        convention=convention,
        max_length_action="truncate",
        **PAIR_LENGTHS,
    )
    assert counts.truncated == 1
    header = ids("<|im_start|>assistant\n")
    if convention is LOSSLESS:
        assert example.source.tolist() == ids("p" * 38 + "<|im_end|>\n")
        assert example.target.tolist() == ids("c" * 15)
    else:
        assert example.source.tolist() == [BOS, *ids("p" * 26 + "<|im_end|>\n"), *header]
        assert example.target.tolist() == ids("c" * 25)
    assert not example.ends


def test_truncated_source_alone_keeps_the_stop_token(tokenizer):
    record = {"prompt": "p" * 99, "completion": "c"}
    (example,) = examples(tokenizer, record, "supervised", max_length_action="truncate", **PAIR_LENGTHS)
    assert isinstance(example, Example)
    assert example.ends
    assert example.target[-1] == END


def test_no_room_behind_the_header(tokenizer):
    with pytest.raises(ValueError, match="does not fit a row of 16 and 10"):
        examples(tokenizer, SHORT, "supervised", max_length_action="truncate", target_length=10)
