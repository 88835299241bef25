import copy
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from twofold.config.data import SourceConfig
from twofold.data import build
from twofold.data.build import build_store, fingerprint
from twofold.data.chat import record_to_example
from twofold.data.convention import Convention

END = 257
CONVENTION = Convention(
    decoder_start="last_source_token",
    bos_token_id=256,
    source_bos=False,
    stop_token_ids=(END,),
    pad_token_id=END,
)


def made(path, tokenizer, cache, workers=1, progress=None, **fields):
    source = SourceConfig(path=str(path), **fields)
    return build_store(source, tokenizer, CONVENTION, cache=cache, workers=workers, progress=progress)


def documents(store):
    return [store.document(n).tolist() for n in range(store.num_documents)]


def jsonl(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_running_text_is_what_the_tokenizer_gives(tmp_path, tokenizer, ids):
    texts = ["one", "zwei \u00e4", "x" * 300]
    store = made(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), tokenizer, tmp_path / "cache")
    assert documents(store) == [ids(text) for text in texts]
    assert store.tokens.dtype == np.uint16
    assert store.parts is None
    assert store.lengths.tolist() == [3, 7, 300]


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer):
    class Large:
        def __call__(self, text, *, add_special_tokens):
            return {"input_ids": [70_000 + ord(c) for c in text]}

        def get_vocab(self):
            return {"a": 0, "z": 70_200}

    store = made(jsonl(tmp_path / "a.jsonl", [{"text": "ab"}]), Large(), tmp_path / "cache")
    assert store.tokens.dtype == np.uint32
    assert documents(store) == [[70_097, 70_098]]


def test_pairs_are_the_examples(tmp_path, tokenizer):
    rows = [{"p": f"question {n}", "c": f"answer {n}"} for n in range(3)]
    fields = {"prompt_field": "p", "completion_field": "c"}
    store = made(jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", **fields)
    for n, row in enumerate(rows):
        record = {"prompt": row["p"], "completion": row["c"]}
        example = record_to_example(record, tokenizer, CONVENTION)
        source_len, prefix_len = store.parts[n].tolist()
        tokens = store.document(n).tolist()
        assert tokens[:source_len] == example.source.tolist()
        assert tokens[source_len : source_len + prefix_len] == example.decoder_prefix.tolist()
        assert tokens[source_len + prefix_len :] == example.target.tolist()


def content(folder):
    """All files of the one store in a cache."""
    (header,) = folder.glob("*/header.json")
    return {file.name: file.read_bytes() for file in sorted(header.parent.iterdir())}


def test_workers_change_nothing_and_leave_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 200)
    rows = [{"text": f"document {n} " * (1 + n % 7)} for n in range(60)]
    lines = [json.dumps(row) for row in rows]
    lines[17] = "{broken"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    seen = []
    for workers in (1, 2):
        cache = tmp_path / f"cache{workers}"
        store = made(tmp_path / "a.jsonl.gz", tokenizer, cache, workers, progress=seen.append)
        assert store.num_documents == 59
    assert content(tmp_path / "cache1") == content(tmp_path / "cache2")
    assert {p.suffix for p in (tmp_path / "cache2").iterdir()} == {"", ".lock"}
    assert len(seen) > 20
    assert seen[-1].documents == 59
    assert seen[-1].share_read == 1
    monkeypatch.setattr(build, "SHARD_BYTES", 1 << 20)
    made(tmp_path / "a.jsonl.gz", tokenizer, tmp_path / "cache3")
    assert content(tmp_path / "cache1") == content(tmp_path / "cache3")


KILLED = """
import pickle, sys, time
from twofold.data import build
from twofold.data.store import tokenize_records
build.SHARD_BYTES = 200
def slowly(*arguments):
    time.sleep(0.05)
    return tokenize_records(*arguments)
build.tokenize_records = slowly
source, tokenizer, convention, cache = pickle.load(open(sys.argv[1], "rb"))
build.build_store(source, tokenizer, convention, cache=cache, workers=1)
"""


def test_a_killed_build_goes_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 200)
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"document {n} " * 10} for n in range(200)])
    source, cache = SourceConfig(path=str(file)), tmp_path / "cache"
    (tmp_path / "job").write_bytes(pickle.dumps((source, tokenizer, CONVENTION, cache)))
    paths = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "job"], env={**os.environ, "PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*.partial/shards/*.npz"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (scratch,) = cache.glob("*.partial")
    kept = {shard.name: shard.stat().st_mtime_ns for shard in scratch.glob("shards/*.npz")}
    assert not list(cache.glob("*/header.json"))

    written = []
    whole = build._Job.write_shard

    def write_shard(self, records, shard):
        written.append(shard.name)
        whole(self, records, shard)

    monkeypatch.setattr(build._Job, "write_shard", write_shard)
    store = build_store(source, tokenizer, CONVENTION, cache=cache, workers=1)
    assert store.num_documents == 200
    assert len(kept) >= 5
    assert not set(kept) & set(written)
    assert not scratch.exists()
    build_store(source, tokenizer, CONVENTION, cache=tmp_path / "other", workers=1)
    assert content(cache) == content(tmp_path / "other")


def test_the_cache_knows_what_matters(tmp_path, tokenizer, monkeypatch):
    file, cache = jsonl(tmp_path / "a.jsonl", [{"text": "a", "body": "bb"}]), tmp_path / "cache"
    calls = []
    real = build.tokenize_records
    monkeypatch.setattr(build, "tokenize_records", lambda *a: calls.append(1) or real(*a))
    made(file, tokenizer, cache)
    made(file, tokenizer, cache)
    made(file, tokenizer, cache, weight=3.0, epochs=2.0)
    assert len(calls) == 1
    assert made(file, tokenizer, cache, text_field="body").lengths.tolist() == [2]
    jsonl(file, [{"text": "abc"}])
    assert made(file, tokenizer, cache).lengths.tolist() == [3]
    assert len(calls) == 3


def test_fingerprints(tokenizer):
    before = fingerprint(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.pad_token = "<|im_end|>"
    other("some text", truncation=True, max_length=2, padding="max_length")  # a tokenizer remembers these
    assert other.backend_tokenizer.truncation is not None
    assert fingerprint(other) == before
    other.add_tokens(["new"])
    assert fingerprint(other) != before
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    assert fingerprint(other) != before


def test_two_at_once_make_one_store(tmp_path, tokenizer, monkeypatch):
    file, calls = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), []
    real = build.tokenize_records

    def slowly(*arguments):
        calls.append(1)
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(build, "tokenize_records", slowly)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(made(file, tokenizer, tmp_path / "cache")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [documents(store) for store in results] == [documents(results[0])] * 3


def test_limits(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 40)
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x" * (1 + n)} for n in range(30)])
    for workers in (1, 2):
        cache = tmp_path / f"cache{workers}"
        assert made(file, tokenizer, cache, workers, max_documents=4).lengths.tolist() == [1, 2, 3, 4]
        assert made(file, tokenizer, cache, workers, max_tokens=14).lengths.tolist() == [1, 2, 3, 4]
        assert made(file, tokenizer, cache, workers, max_tokens=15).lengths.tolist() == [1, 2, 3, 4, 5]
        assert made(file, tokenizer, cache, workers, max_documents=99).num_documents == 30
    with pytest.raises(ValueError, match="no documents within max_tokens=1"):
        made(jsonl(tmp_path / "b.jsonl", [{"text": "long"}]), tokenizer, tmp_path / "cache", max_tokens=1)


def test_bad_records_are_counted(tmp_path, tokenizer):
    good = [json.dumps({"text": "good"})] * 3
    bad = ["{oops", "3", '{"body": "x"}', '{"text": 4}', '{"text": ""}', '{"text": "  "}']
    (tmp_path / "a.jsonl").write_bytes("\n".join([*good, *bad]).encode() + b'\n{"text": "\xff"}\n')
    counts = made(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache").counts
    again = made(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache").counts  # from the header
    for one in (counts, again):
        assert one.records == 10
        assert dict(one.bad) == {
            "not JSON": 1, "not an object": 1, "no column": 1, "wrong type": 1, "empty text": 2, "not UTF-8": 1
        }  # fmt: skip
        assert one.num_broken == 5
        assert len(one.examples) == 5
        assert "a.jsonl, line 4: not JSON" in one.examples[0]
    assert counts.summary().startswith("7 of 10 records skipped (2 empty text, 1 no column, ")


def test_bad_pairs_are_counted(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"m": turns}, {"m": turns[:1]}, {"m": [turns[0], {**turns[1], "content": ""}]}]
    store = made(jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", messages_field="m")
    assert dict(store.counts.bad) == {"not a usable pair": 2}
    assert "line 2: a conversation must end with a reply" in store.counts.examples[0]


def test_a_template_that_refuses_a_chat(tmp_path, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
        + tokenizer.chat_template
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"m": turns}, {"m": [{"role": "tool", "content": "t"}, *turns]}]
    store = made(jsonl(tmp_path / "a.jsonl", rows), strict, tmp_path / "cache", messages_field="m")
    assert dict(store.counts.bad) == {"chat does not render": 1}
    assert "no tools" in store.counts.examples[0]


def test_a_source_without_the_column_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    file = jsonl(tmp_path / "a.jsonl", [{"body": "x"}, {"body": "y"}])
    with pytest.raises(
        ValueError, match=r"no record can be used: 2 of 2 .*a.jsonl, line 1: no column 'text'"
    ):
        made(file, tokenizer, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"has no documents: 1 of 1 records skipped \(1 empty text\)"):
        made(tmp_path / "b.jsonl", tokenizer, tmp_path / "cache")
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no documents"):
        made(tmp_path / "c.txt", tokenizer, tmp_path / "cache", document="line")


def test_a_damaged_store_is_refused(tmp_path, tokenizer):
    file, cache = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), tmp_path / "cache"
    made(file, tokenizer, cache)
    (tokens,) = cache.glob("*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens.bin has 4 bytes, its header says 6; remove"):
        made(file, tokenizer, cache)


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", "/somewhere")
    assert build.default_cache() == Path("/somewhere")
    monkeypatch.delenv("TWOFOLD_CACHE")
    assert build.default_cache() == Path.home() / ".cache" / "twofold" / "tokens"


def test_a_worker_that_dies_is_reported(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 10)
    monkeypatch.setattr(build.sys, "executable", "false")
    file = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghij"}] * 4)
    with pytest.raises(RuntimeError, match="a process that tokenises has died"):
        made(file, tokenizer, tmp_path / "cache", workers=2)
