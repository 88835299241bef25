"""Records of preferences in every form, what is left out and said of it, and the order of batches."""

import gzip
import json
import logging

import numpy as np
import pytest

from tests.posttrain.tiny_pairs import RECORDS, data_config, pairs_of, written
from tests.train.tiny_run import tiny_model
from twofold.config.preferences import PairSource
from twofold.data import Convention, messages_to_example
from twofold.data.sources import BadRecord, RawRecord
from twofold.posttrain.pair_records import PairRecord, parse_pair
from twofold.posttrain.pairs import PairLoader, open_pairs
from twofold.posttrain.preferences import collate_pairs

HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Two\n\nparagraphs.\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Two\n\nparagraphs."},
]


def message(role, content):
    return {"role": role, "content": content}


def parsed(row, **fields):
    return parse_pair(RawRecord("here", "row", row), PairSource(path="x", **fields))


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {}, PairRecord("p", "c", "r")),
        (
            {"prompt": TURNS, "chosen": [message("assistant", "c")], "rejected": message("assistant", "r")},
            {},
            PairRecord(TURNS, "c", "r"),
        ),
        (
            {
                "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi."}],
                "chosen": {"from": "gpt", "value": "c"},
                "rejected": {"from": "gpt", "value": "r"},
            },
            {"prompt_field": "conversations"},
            PairRecord([message("system", "Be kind."), message("user", "Hi.")], "c", "r"),
        ),
        ({"chosen": f"{HH} Yes. ", "rejected": f"{HH} No."}, {"prompt_field": None}, PairRecord(TURNS, "Yes.", "No.")),
        (
            {"a": [*TURNS, message("assistant", "c")], "b": [*TURNS, message("assistant", "r")], "m": 2},
            {"prompt_field": None, "chosen_field": "a", "rejected_field": "b", "margin_field": "m"},
            PairRecord(TURNS, "c", "r", 2.0),
        ),
    ],
    ids=["texts", "messages", "llama-factory", "transcripts", "conversations"],
)  # fmt: skip
def test_every_form_comes_to_the_same(row, fields, expected):
    assert parsed(row, **fields) == expected


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"prompt": "p", "chosen": "c"}, {}, "no column"),
        ({"prompt": "p", "chosen": " ", "rejected": "r"}, {}, "empty reply"),
        ({"prompt": " ", "chosen": "c", "rejected": "r"}, {}, "empty prompt"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, {}, "wrong type"),
        ({"prompt": [{"from": "robot", "value": "x"}], "chosen": "c", "rejected": "r"}, {}, "wrong type"),
        ({"prompt": "p", "chosen": [*TURNS, message("assistant", "c")], "rejected": "r"}, {}, "no reply"),
        ({"prompt": "p", "chosen": message("user", "c"), "rejected": "r"}, {}, "no reply"),
        ({"chosen": f"{HH} Yes.", "rejected": f"x{HH} No."}, {"prompt_field": None}, "no transcript"),
        (
            {"chosen": f"{HH} Yes.", "rejected": f"\n\nHuman: A{HH} No."},
            {"prompt_field": None},
            "two prompts",
        ),
        ({"chosen": f"{HH} Yes.", "rejected": f"{HH} No.\n\nHuman: A"}, {"prompt_field": None}, "no reply"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "m": -1}, {"margin_field": "m"}, "no margin"),
    ],
)
def test_bad_records_have_a_reason(row, fields, reason):
    with pytest.raises(BadRecord, match="here") as error:
        parsed(row, **fields)
    assert error.value.reason == reason


def test_replies_become_the_examples_of_supervised_tuning(text_model, tmp_path):
    model = text_model()
    convention = Convention.of(model.config)
    path = tmp_path / "hh.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"chosen": f"{HH} Yes.", "rejected": f"{HH} No."}) + "\n")
    data = data_config(path, {"prompt_field": None}, source_length=200)
    (pair,) = open_pairs(data, model.tokenizer, convention).train
    for example, reply in ((pair.chosen, "Yes."), (pair.rejected, "No.")):
        expected = messages_to_example([*TURNS, message("assistant", reply)], model.tokenizer, convention)
        for ours, theirs in zip(example[:3], expected[:3], strict=True):
            assert ours.tolist() == theirs.tolist()
        assert example.target[-1] == 257  # <|im_end|>
    assert pair.where == f"{path}, line 1"


def test_what_is_left_out_is_counted_and_said(tmp_path, caplog):
    model = tiny_model()
    convention = Convention.of(model.config)
    rows = [
        *RECORDS,
        {"prompt": "tie", "chosen": "same", "rejected": "same"},
        {"prompt": "long", "chosen": "x" * 80, "rejected": "y"},
        {"prompt": "empty", "chosen": "", "rejected": "y"},
    ]
    data = data_config(written(tmp_path / "p.jsonl", rows), max_length_action="skip", max_bad_share=0.1)
    with caplog.at_level(logging.WARNING):
        pairs = open_pairs(data, model.tokenizer, convention)
    assert len(pairs.train) == len(RECORDS)
    (line,) = pairs.report
    for said in (
        "16 pairs",
        "1 of 19 records skipped (1 empty reply); first: ",
        "p.jsonl, line 19: a reply is empty",
        "1 pairs dropped: chosen and rejected are the same",
        "1 pairs dropped: longer than allowed (max_length_action='skip')",
    ):
        assert said in line
    assert len(caplog.messages) == 3
    with pytest.raises(ValueError, match=r"1 empty reply.* more than max_bad_share=0.01"):
        open_pairs(data.model_copy(update={"max_bad_share": 0.01}), model.tokenizer, convention)
    with pytest.raises(
        ValueError, match=r"line 18: a pair of 4 prompt tokens and replies of up to 81 does not fit"
    ):
        open_pairs(data.model_copy(update={"max_length_action": "error"}), model.tokenizer, convention)
    cut = open_pairs(data.model_copy(update={"max_length_action": "truncate"}), model.tokenizer, convention)
    assert "1 pairs are longer than allowed and are cut" in cut.report[0]
    long = cut.train[-1]
    assert (len(long.chosen.target), long.chosen.ends, long.rejected.ends) == (60, False, True)


def test_two_bos_and_missing_stop_tokens_are_errors(tmp_path):
    model = tiny_model()
    rows = [{**row, "prompt": "<bos>" + row["prompt"]} for row in RECORDS]
    data = data_config(written(tmp_path / "p.jsonl", rows))
    convention = Convention(
        decoder_start="bos", bos_token_id=258, source_bos=True, stop_token_ids=(257,), pad_token_id=256
    )
    assert (
        len(open_pairs(data, model.tokenizer, convention).train) == 16
    )  # one BOS is taken as the convention's
    doubled = written(tmp_path / "q.jsonl", [{**row, "prompt": "<bos>" + row["prompt"]} for row in rows])
    with pytest.raises(ValueError, match=r"16 not a usable pair.*starts with two BOS tokens \(258\)"):
        open_pairs(data_config(doubled), model.tokenizer, convention)


def test_a_template_without_stop_token_is_an_error(text_model, tmp_path):
    model = text_model(eos_token_ids=(1,))
    data = data_config(written(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match=r"16 not a usable pair.*is not a stop token"):
        open_pairs(data, model.tokenizer, Convention.of(model.config))


def test_prompts_are_on_one_side(tmp_path):
    model = tiny_model()
    convention = Convention.of(model.config)
    rows = [{**row, "prompt": row["prompt"][:6]} for row in RECORDS]  # each prompt twice
    path = written(tmp_path / "p.jsonl", rows)
    pairs = open_pairs(data_config(path, held_out_fraction=0.4), model.tokenizer, convention)
    sides = [{pair.chosen.source.tobytes() for pair in side} for side in (pairs.train, pairs.held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert len(pairs.train) + len(pairs.held_out) == 16
    assert f"{len(pairs.held_out)} held out" in pairs.report[0]
    held = written(tmp_path / "h.jsonl", rows[:1])
    pairs = open_pairs(data_config(path, held_out=[{"path": str(held)}]), model.tokenizer, convention)
    assert (len(pairs.train), len(pairs.held_out)) == (14, 1)
    assert "2 pairs dropped: prompt is held out" in pairs.report[0]
    with pytest.raises(ValueError, match="no pair to train on"):
        open_pairs(data_config(path, held_out=[{"path": str(path)}]), model.tokenizer, convention)


def test_parquet_and_text(tmp_path):
    datasets = pytest.importorskip("datasets")
    model = tiny_model()
    convention = Convention.of(model.config)
    rows = [{**row, "unread": 1} for row in RECORDS]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    expected = pairs_of(model, tmp_path)
    found = open_pairs(data_config(tmp_path / "p.parquet"), model.tokenizer, convention).train
    assert [pair.digest() for pair in found] == [pair.digest() for pair in expected]
    found = open_pairs(data_config(tmp_path / "p.parquet", {"max_pairs": 5}), model.tokenizer, convention)
    assert len(found.train) == 5
    (tmp_path / "p.txt").write_text("text")
    with pytest.raises(ValueError, match="read as text, which has no columns"):
        open_pairs(data_config(tmp_path / "p.txt"), model.tokenizer, convention)


def loader(pairs, **options):
    changes = {name: options.pop(name) for name in ("shuffle", "seed") if name in options}
    return PairLoader(pairs, data_config("unused", **changes), collate_pairs(256), **options)


def names(batches):
    return [batch.documents for batch in batches]


def test_every_epoch_has_every_pair_once_in_another_order(tmp_path):
    pairs = pairs_of(tiny_model(), tmp_path)
    ours = loader(pairs)
    assert ours.batches_per_epoch == 6
    epochs = [names(ours.next_step()[0] for _ in range(6)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(name for batch in epoch for name in batch) == sorted(pair.where for pair in pairs)
        assert sorted(map(len, epoch)) == [1, 3, 3, 3, 3, 3]
    together = [set(map(frozenset, epoch)) for epoch in epochs]
    assert together[0] != together[1] != together[2]  # not the same batches in another order
    other = loader(pairs, seed=1)
    assert names(other.next_step()[0] for _ in range(6)) != epochs[0]
    again = loader(pairs)
    assert names(again.next_step()[0] for _ in range(6)) == epochs[0]
    plain = loader(pairs, shuffle=False)
    assert [name for batch in names(plain.next_step()[0] for _ in range(6)) for name in batch] == [
        pair.where for pair in pairs
    ]


def test_pairs_of_similar_length_come_together(tmp_path):
    pairs = pairs_of(tiny_model(), tmp_path)
    lengths = {pair.where: pair.length for pair in pairs}
    batches = [[lengths[name] for name in batch] for batch in names(loader(pairs).one_pass())]
    flat = [length for batch in batches for length in batch]
    assert flat == sorted(lengths.values())
    ours = loader(pairs)
    spreads = [np.ptp([lengths[name] for name in ours.next_step()[0].documents]) for _ in range(6)]
    assert sum(spreads) <= np.ptp(flat)  # cuts of one sorted row


def test_streams_give_what_one_gives_and_go_on_where_they_stopped(tmp_path):
    pairs = pairs_of(tiny_model(), tmp_path)
    whole = loader(pairs, num_streams=4)
    steps = [names(whole.next_step()) for _ in range(5)]
    halves = [loader(pairs, num_streams=4, owned=owned) for owned in ((0, 2), (1, 3))]
    for step in steps[:3]:
        even, odd = (names(half.next_step()) for half in halves)
        assert step == [even[0], odd[0], even[1], odd[1]]
    states = [half.state_dict() for half in halves]
    state = json.loads(json.dumps({**states[0], "streams": states[0]["streams"] | states[1]["streams"]}))
    assert sorted(state["streams"]) == ["0", "1", "2", "3"]
    resumed = loader(pairs, num_streams=4)
    resumed.load_state_dict(state)
    assert [names(resumed.next_step()) for _ in range(2)] == steps[3:]


@pytest.mark.parametrize("other", [{"seed": 1}, {"shuffle": False}, {"identity": b"reference"}])
def test_a_state_of_other_pairs_is_refused(tmp_path, other):
    pairs = pairs_of(tiny_model(), tmp_path)
    state = loader(pairs).state_dict()
    with pytest.raises(ValueError, match="saved state of the loader has"):
        loader(pairs, **other).load_state_dict(state)
    with pytest.raises(ValueError, match="has pairs "):
        loader([pairs[0]._replace(margin=1.0), *pairs[1:]]).load_state_dict(state)
