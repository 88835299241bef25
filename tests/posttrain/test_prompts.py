"""Prompts from files: their forms, what is skipped, held out and refused, and their order."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.posttrain.tiny_pairs import written
from tests.posttrain.tiny_rollouts import RECORDS
from tests.train.tiny_run import BOS, byte_tokenizer, tiny_model
from twofold.config.grpo import PromptData
from twofold.data import Convention
from twofold.data.sources import BadRecord
from twofold.posttrain.prompts import PromptOrder, open_prompts, prompts_digest


def opened(path, wanted=(), check=None, source=None, tokenizer=None, **changes):
    values = {
        "sources": [{"path": str(path), **(source or {})}],
        "source_length": 60,
        "prompts_per_batch": 2,
    }
    convention = Convention.of(tiny_model().config)
    return open_prompts(
        PromptData(**(values | changes)), wanted, tokenizer or byte_tokenizer(), convention, check=check
    )


def test_a_record_becomes_what_the_model_reads_and_what_rewards_know(tmp_path):
    rows = [{"q": "1+2", "a": "3", "level": 2}, {"q": ["one.", "two."], "a": "x", "level": 1}]
    source = {"prompt_field": "q", "template": "Q: {prompt}?", "columns": {"answer": "a"}}
    prompts = opened(written(tmp_path / "p.jsonl", rows), ["answer", "level"], source=source).train
    assert [p.prompt for p in prompts] == ["Q: 1+2?", "Q: one. two.?"]
    assert byte_tokenizer().decode(prompts[0].source) == "Q: 1+2?"
    assert prompts[0].prefix.tolist() == [BOS]
    assert [p.record for p in prompts] == [{"answer": "3", "level": 2}, {"answer": "x", "level": 1}]
    assert prompts[1].where.endswith("p.jsonl, line 2")


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "parquet"])
def test_every_kind_of_file_gives_the_same(kind, tmp_path):
    expected = opened(written(tmp_path / "p.jsonl", RECORDS), ["answer"]).train
    path = tmp_path / f"q.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in RECORDS).encode()))
    found = opened(path, ["answer"]).train
    assert prompts_digest(found) == prompts_digest(expected)
    changed = [p._replace(record={**p.record, "answer": "0"}) for p in found]
    assert prompts_digest(changed) != prompts_digest(found)


def test_messages_and_texts_go_through_the_chat_template(byte_tokenizer, tmp_path):
    rows = [
        {"prompt": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]},
        {"prompt": "Hi"},
    ]
    convention = Convention(
        decoder_start="last_source_token",
        bos_token_id=256,
        source_bos=False,
        stop_token_ids=(257,),
        pad_token_id=257,
    )
    data = PromptData(
        sources=[{"path": str(written(tmp_path / "p.jsonl", rows))}], source_length=99, prompts_per_batch=1
    )
    prompts = open_prompts(data, [], byte_tokenizer, convention).train
    texts = [byte_tokenizer.decode(p.source) for p in prompts]
    assert texts[0] == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert texts[1] == "<|im_start|>user\nHi<|im_end|>\n"
    assert byte_tokenizer.decode(prompts[1].prefix) == "<|im_start|>assistant\n"
    assert prompts[0].prompt[1] == {"role": "user", "content": "Hi"}


def test_what_cannot_be_used_is_counted_and_too_much_of_it_refused(tmp_path):
    rows = [*RECORDS, {"prompt": " "}, {"prompt": 3}, {"other": "x"}]
    path = written(tmp_path / "p.jsonl", rows)
    found = opened(path, max_bad_share=0.5)
    assert len(found.train) == len(RECORDS)
    assert "3 of 12 records skipped (1 empty prompt, 1 no column, 1 wrong type)" in found.report[0]
    with pytest.raises(ValueError, match=r"more than max_bad_share=0.05; repair the data, set prompt_field"):
        opened(path)

    def odd(record, where):
        if record["where"] % 2:
            raise BadRecord("odd", f"{where}: odd")

    found = opened(written(tmp_path / "q.jsonl", RECORDS), ["where"], odd, max_bad_share=0.5)
    assert [p.record["where"] for p in found.train] == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="no column 'answers'"):
        opened(tmp_path / "q.jsonl", ["answers"])


def test_long_prompts_are_refused_skipped_or_cut_at_their_beginning(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"prompt": "short"}, {"prompt": "abcdefghijkl"}])
    with pytest.raises(ValueError, match=r"line 2: a prompt of 12 tokens does not fit source_length=6"):
        opened(path, source_length=6)
    skipped = opened(path, source_length=6, max_length_action="skip")
    assert [p.prompt for p in skipped.train] == ["short"]
    assert "1 prompts dropped: longer than allowed" in skipped.report[0]
    cut = opened(path, source_length=6, max_length_action="truncate")
    assert byte_tokenizer().decode(cut.train[1].source) == "ghijkl"
    assert "1 prompts are longer" in cut.report[0]


def test_held_out_prompts_are_not_trained_on(tmp_path):
    path = written(tmp_path / "p.jsonl", [*RECORDS, *RECORDS])  # both copies on one side
    found = opened(path, held_out_fraction=0.4)
    sides = [{p.prompt for p in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == len(RECORDS)
    assert len(found.train) + len(found.held_out) == 2 * len(RECORDS)
    assert f"{len(found.held_out)} held out" in found.report[0]
    held = written(tmp_path / "held.jsonl", RECORDS[:2])
    given = opened(path, held_out=[{"path": str(held)}])
    assert (len(given.train), len(given.held_out)) == (2 * len(RECORDS) - 4, 2)
    with pytest.raises(ValueError, match="there is no prompt to train on"):
        opened(path, held_out=[{"path": str(path)}])


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own():
    order = PromptOrder(7, 3, shuffle=True)
    epochs = [[order[epoch * 7 + place] for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = PromptOrder(7, 4, shuffle=True)
    assert [other[place] for place in range(7)] != epochs[0]
    assert [PromptOrder(7, 3, shuffle=False)[place] for place in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
