import contextlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.config.data import DataConfig
from twofold.data.convention import Convention, Example
from twofold.data.examples import ExampleMaker, mixture_of, required_sentinels
from twofold.data.loader import Loader
from twofold.data.split import Corpus
from twofold.data.stream import Exhausted
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


def corpus(tokenizer, records, convention=LOSSLESS, **source):
    made = Corpus.from_records(records, tokenizer, convention)
    return replace(made, source=made.source.model_copy(update=source))


def loader(tokenizer, *args, records=DOCUMENTS, convention=LOSSLESS, num_streams=1, owned=None, **changes):
    return Loader(
        [corpus(tokenizer, records, convention)],
        tokenizer,
        config(*args, **changes),
        convention,
        sentinels(tokenizer),
        num_streams=num_streams,
        owned=owned,
    )


def as_lists(batch):
    values = [getattr(batch, name) for name in batch.__dataclass_fields__]
    return [
        list(value) if isinstance(value, tuple) else value.tolist() for value in values if value is not None
    ]


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
    for position, state in enumerate(states):
        resumed = loader(tokenizer, objective, packing=packing)
        resumed.load_state_dict(state)
        assert [as_lists(next(resumed)) for _ in range(14 - position)] == batches[position:]
        assert resumed.counts == straight.counts


def test_resuming_with_other_owned_streams(tokenizer):
    """What two ranks have done goes on in four, three or one, in the same batches."""
    whole = loader(tokenizer, num_streams=4)
    ranks = [loader(tokenizer, num_streams=4, owned=owned) for owned in ([0, 2], [1, 3])]
    for _ in range(3):
        expected = [as_lists(batch) for batch in whole.next_step()]
        evens, odds = ([as_lists(batch) for batch in rank.next_step()] for rank in ranks)
        assert [evens[0], odds[0], evens[1], odds[1]] == expected
    merged = ranks[0].state_dict()
    merged["streams"].update(ranks[1].state_dict()["streams"])
    assert merged == whole.state_dict()
    merged = json.loads(json.dumps(merged))
    after = [[as_lists(batch) for batch in whole.next_step()] for _ in range(3)]
    for owned in ([0], [3], [0, 1, 2], [0, 1, 2, 3]):
        resumed = loader(tokenizer, num_streams=4, owned=owned)
        resumed.load_state_dict(merged)
        got = [[as_lists(batch) for batch in resumed.next_step()] for _ in range(3)]
        assert got == [[step[n] for n in owned] for step in after]
    with pytest.raises(ValueError, match=r"has streams \[0, 2\], but \[1\] are needed too"):
        loader(tokenizer, num_streams=4, owned=[0, 1]).load_state_dict(ranks[0].state_dict())


def test_state_of_other_data_is_refused(tokenizer):
    state = loader(tokenizer).state_dict()
    with pytest.raises(ValueError, match="has seed 0, this run has 1"):
        loader(tokenizer, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has units \[7\], this run has \[6\]"):
        loader(tokenizer, records=DOCUMENTS[:5] + DOCUMENTS[:1]).load_state_dict(state)
    with pytest.raises(ValueError, match="has shuffle True, this run has False"):
        loader(tokenizer, shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="has num_streams 1, this run has 2"):
        loader(tokenizer, num_streams=2).load_state_dict(state)


def test_state_is_small(tokenizer):
    records = [{"text": "word " * 50}] * 400
    made = loader(tokenizer, records=records)
    next(made)
    assert len(json.dumps(made.state_dict())) < 256 * 20 + 1000


def letters(tokenizer, made, num_steps):
    """The first letter of every example, by step and stream; one example per row."""
    return [
        [
            [text_of(tokenizer, batch, row)[0] for row in range(len(batch.input_ids))]
            for batch in made.next_step()
        ]
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("num_streams", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("num_documents", [1, 3, 8])
def test_streams_together_go_through_every_epoch_once(tokenizer, num_streams, num_documents):
    names = "abcdefgh"[:num_documents]
    records = [{"text": letter * 4} for letter in names]
    changes = {"records": records, "packing": False, "rows_per_batch": 1, "num_streams": num_streams}
    steps = letters(tokenizer, loader(tokenizer, **changes), 3 * num_documents)
    # Stream s takes positions s, s + A...: read step by step, that is the order of epochs.
    order = [batch[0] for step in steps for batch in step]
    epochs = [order[n : n + num_documents] for n in range(0, len(order), num_documents)]
    assert all(sorted(epoch) == list(names) for epoch in epochs)
    assert len(epochs) == 3 * num_streams
    # And the same epochs whatever the number of streams is.
    single = letters(tokenizer, loader(tokenizer, **{**changes, "num_streams": 1}), len(order))
    assert [batch[0] for step in single for batch in step] == order


def test_streams_that_do_not_exist(tokenizer):
    for num_streams, owned in ((0, None), (2, [2]), (2, [])):
        with pytest.raises(ValueError, match="streams are numbered 0 to num_streams - 1"):
            loader(tokenizer, num_streams=num_streams, owned=owned)
    with pytest.raises(ValueError, match="2 streams; take next_step"):
        next(loader(tokenizer, num_streams=2))


def mixture(tokenizer, sources, num_streams=1, owned=None, **changes):
    corpora = [corpus(tokenizer, records, **source) for records, source in sources]
    return Loader(corpora, tokenizer, config(**changes), LOSSLESS, num_streams=num_streams, owned=owned)


def tokens_by_letter(tokenizer, batches):
    counts = {}
    for batch in batches:
        for row in range(len(batch.input_ids)):
            for segment in range(1, int(batch.decoder_segment_ids[row].max()) + 1):
                source = batch.input_ids[row][batch.segment_ids[row] == segment].tolist()
                decoder = batch.decoder_input_ids[row][batch.decoder_segment_ids[row] == segment].tolist()
                letter = tokenizer.decode([*source, *decoder])[0]
                counts[letter] = counts.get(letter, 0) + len(source) + len(decoder)
    return counts


def test_shares_of_tokens_are_those_of_the_weights(tokenizer):
    # Lengths differ, so shares of documents would be far off.
    sources = [
        ([{"text": "a" * 30}, {"text": "a" * 4}], {"weight": 1}),
        ([{"text": "b" * 5}], {"weight": 2}),
        ([{"text": "c" * 11}] * 7, {"weight": 5}),
    ]
    for num_streams in (1, 3):
        made = mixture(tokenizer, sources, num_streams=num_streams, packing=False, rows_per_batch=1)
        counts = tokens_by_letter(tokenizer, [batch for _ in range(200) for batch in made.next_step()])
        total = sum(counts.values())
        for letter, share in {"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}.items():
            # At most about one example of a source ahead or behind, in each stream.
            assert abs(counts[letter] - share * total) <= 2 * 31 * num_streams


def test_a_source_that_is_used_up_drops_out(tokenizer):
    sources = [
        ([{"text": "a" * 4}] * 3, {"weight": 1, "epochs": 2}),
        ([{"text": "b" * 4}] * 4, {"weight": 1, "epochs": 0.5}),
    ]
    made = mixture(tokenizer, sources, packing=False, rows_per_batch=1)
    seen = [letters(tokenizer, made, 1)[0][0][0] for _ in range(8)]
    assert (seen.count("a"), seen.count("b")) == (6, 2)
    assert seen[:4].count("a") == 2
    assert seen[4:] == ["a"] * 4
    with pytest.raises(
        Exhausted, match="after 8 batches of stream 0; raise epochs of a source, or lower steps"
    ):
        next(made)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_epochs_without_weights(tokenizer, num_streams):
    sources = [([{"text": "a" * 4}] * 3, {"epochs": 1}), ([{"text": "b" * 4}] * 4, {"epochs": 2.5})]
    seen = []
    for stream in range(num_streams):
        made = mixture(tokenizer, sources, num_streams, [stream], packing=False, rows_per_batch=1)
        with contextlib.suppress(Exhausted):
            while True:
                seen.append(letters(tokenizer, made, 1)[0][0][0])
    assert (seen.count("a"), seen.count("b")) == (3, 10)


def test_a_mixture_resumes(tokenizer):
    sources = [(DOCUMENTS, {"weight": 1, "epochs": 3}), (DOCUMENTS[::-1], {"weight": 3})]
    changes = {"num_streams": 2, "packing": False, "rows_per_batch": 1}
    straight = mixture(tokenizer, sources, **changes)
    states, steps = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(straight.state_dict())))
        steps.append([as_lists(batch) for batch in straight.next_step()])
    for position, state in enumerate(states):
        resumed = mixture(tokenizer, sources, **changes)
        resumed.load_state_dict(state)
        got = [[as_lists(batch) for batch in resumed.next_step()] for _ in range(12 - position)]
        assert got == steps[position:]


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
        pad_multiple=1,
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


def examples(tokenizer, record, *args, convention=LOSSLESS, **changes):
    """All examples of a record in order."""
    made = maker(tokenizer, *args, convention=convention, **changes)
    store = corpus(tokenizer, [record], convention).store
    starts, ends = np.zeros(1, int), np.asarray([store.num_tokens])
    found = []
    for unit in range(int(made.units_per_document(store.lengths)[0])):
        (start,), (end,) = made.unit_spans(starts, ends, np.asarray([unit]))
        parts = None if store.parts is None else tuple(store.parts[0].tolist())
        tokens = store.tokens[start:end].astype(np.int64)
        found += made.examples(tokens, parts, ends=bool(end == ends[0]), seed=(0, unit))
    return found


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
        ValueError, match=r"'span_corruption' needs 29 sentinels for chunks of up to 570 tokens, got 28"
    ):
        Loader([corpus(tokenizer, DOCUMENTS)], tokenizer, wanted, LOSSLESS, sentinels(tokenizer)[:28] * 2)
    assert (
        next(
            Loader([corpus(tokenizer, DOCUMENTS)], tokenizer, wanted, LOSSLESS, sentinels(tokenizer)[:29])
        ).num_scored_tokens
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
    assert (made.counts.units, made.counts.examples, made.counts.batches) == (3, 3, 3)
    assert made.counts.tokens == 3 * (1 + 3)  # ab|cd: b is given to the decoder, which reads b, c and d
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


def test_batches_are_trimmed_to_a_multiple(tokenizer):
    def shapes(**changes):
        changes = {
            "source_length": 200,
            "target_length": 100,
            "packing": False,
            "rows_per_batch": 1,
            **changes,
        }
        made = loader(tokenizer, records=[{"text": "a" * 30}, {"text": "a" * 100}], shuffle=False, **changes)
        batches = [next(made) for _ in range(2)]
        return [(batch.input_ids.shape[1], batch.labels.shape[1]) for batch in batches]

    # Sources of 14 and 49 tokens, targets of 16 and 51.
    assert shapes() == [(64, 64), (64, 64)]
    assert shapes(pad_multiple=16) == [(16, 16), (64, 64)]
    assert shapes(pad_multiple=1) == [(14, 16), (49, 51)]
    assert shapes(pad_multiple=200) == [(200, 100), (200, 100)]


def test_several_sources_are_one_corpus(tokenizer):
    made = Loader(
        [corpus(tokenizer, [{"text": "aa"}]), corpus(tokenizer, [{"text": "bb"}, {"text": "cc"}])],
        tokenizer,
        config(packing=False, rows_per_batch=3),
        LOSSLESS,
    )
    (batch,) = made.one_pass()
    assert [text_of(tokenizer, batch, row) for row in range(3)] == ["aa", "bb", "cc"]


def test_corpora_without_examples(tokenizer):
    with pytest.raises(ValueError, match="no documents to read"):
        Loader([], tokenizer, config(), LOSSLESS)
    with pytest.raises(ValueError, match="none of 2 documents gave an example"):
        loader(tokenizer, records=[{"text": "b"}, {"text": "a"}])


def test_rows_too_short(tokenizer):
    with pytest.raises(ValueError, match="0 target tokens"):
        loader(tokenizer, target_length=1)


LONG = {"prompt": "p" * 40, "completion": "c" * 30}
SHORT = {"prompt": "p", "completion": "c"}
PAIR_LENGTHS = {"source_length": 40, "target_length": 25}


def test_long_pairs_are_an_error_by_default(tokenizer):
    # "<|im_start|>user\n" is 6 tokens, "<|im_end|>\n" 2, the header "<|im_start|>assistant\n" 11.
    with pytest.raises(ValueError, match=r"document 1 of .*: a pair of 48 source and 41 target tokens"):
        loader(tokenizer, "supervised", records=[SHORT, LONG], shuffle=False, **PAIR_LENGTHS)


def test_long_pairs_can_be_skipped(tokenizer):
    changes = {"packing": False, "rows_per_batch": 1, "max_length_action": "skip", **PAIR_LENGTHS}
    made = loader(tokenizer, "supervised", records=[LONG, SHORT], **changes)
    assert (made.skipped, made.truncated, made.num_units) == (1, 0, 1)
    assert "1 documents dropped: longer than a row" in made.report()[0]
    assert len(list(made.one_pass())) == 1
    with pytest.raises(ValueError, match=r"none of 0 documents gave an example.* \(1 were\)"):
        loader(tokenizer, "supervised", records=[LONG], **changes)


@pytest.mark.parametrize("convention", [LOSSLESS, PUBLISHED], ids=["lossless", "published"])
def test_truncation_keeps_the_end_of_the_source_and_the_start_of_the_target(tokenizer, ids, convention):
    (example,) = examples(
        tokenizer,
        LONG,
        "supervised",
        convention=convention,
        max_length_action="truncate",
        **PAIR_LENGTHS,
    )
    changes = {"convention": convention, "max_length_action": "truncate", **PAIR_LENGTHS}
    assert loader(tokenizer, "supervised", records=[LONG, SHORT], **changes).truncated == 1
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
        loader(tokenizer, "supervised", records=[SHORT], max_length_action="truncate", target_length=10)


def test_denoisers_of_a_unit_each_fill_a_row(tokenizer):
    mixed = {
        "name": "ul2",
        "denoisers": [
            ({"kind": "suffix", "noise_density": 0.75}, 1),
            ({"kind": "span", "noise_density": 0.15, "mean_span_length": 3}, 1),
        ],
    }
    lengths = {"source_length": 64, "target_length": 64}
    found = examples(tokenizer, {"text": "x" * 2000}, mixed, **lengths)
    full = [max(len(example.source), example.decoder_length) for example in found]
    assert sorted(full)[len(full) // 4] >= 62  # a rest is left in each unit of four
    assert max(full) <= 64
    assert {example.ends for example in found} == {True, False}
    assert found[-1].ends


def test_single_tokens_left_over_are_dropped(tokenizer):
    # Chunks of 30: 31 letters leave one, which is no example, so the text does not end in the first.
    (only,) = examples(tokenizer, {"text": "x" * 31})
    assert not only.ends
    _, last = examples(tokenizer, {"text": "x" * 32})
    assert (len(last.source) + len(last.decoder_prefix) + len(last.target), last.ends) == (3, True)


def test_a_rest_of_one_token_joins_the_example_before(tokenizer):
    halves = {"name": "ul2", "denoisers": [({"kind": "suffix", "noise_density": 0.5}, 1)] * 2}
    # Two denoisers of 30 tokens each share a unit; 31 letters are 29 and 2, not 30 and a lost one.
    first, last = examples(tokenizer, {"text": "x" * 31}, halves)
    lengths = [len(e.source) + len(e.decoder_prefix) + len(e.target) for e in (first, last)]
    assert lengths == [29, 2 + 1]  # and a stop token
    assert (first.ends, last.ends) == (False, True)


def test_short_texts_fill_long_rows_on_both_sides(tokenizer):
    records = [{"text": "abcdefghij" * 200} for _ in range(8)]

    def fill(**changes):
        made = loader(
            tokenizer,
            {"name": "ul2", "preset": "t5gemma2"},
            records=records,
            source_length=256,
            target_length=256,
            rows_per_batch=1,
            **changes,
        )
        batches = [next(made) for _ in range(20)]
        lengths = [int(b.segment_ids.max()) for b in batches]
        shares = [
            np.mean([(getattr(b, side) > 0).numpy().sum() / 256 for b in batches])
            for side in ("segment_ids", "decoder_segment_ids")
        ]
        return max(lengths), shares

    one, without = fill()
    several, with_limit = fill(max_text_length=48)
    assert one <= 4 < several
    assert min(with_limit) > 0.9
    assert min(without) < 0.7


def test_batches_know_their_documents(tokenizer):
    batch = next(loader(tokenizer, shuffle=False, rows_per_batch=4, packing=False))
    assert text_of(tokenizer, batch, 0) == DOCUMENTS[0]["text"]
    assert text_of(tokenizer, batch, 1) == DOCUMENTS[1]["text"]
    assert batch.documents[:2] == ("(in memory) 0", "(in memory) 1")
    assert len(set(batch.documents)) == len(batch.documents) <= 4
    assert batch.to("cpu").documents == batch.documents
