import builtins
import gzip
import json

import pytest

from twofold.config.data import DataConfig, SourceConfig
from twofold.data.sources import open_corpora, open_source, split_documents


def opened(path, **fields):
    return list(open_source(SourceConfig(path=str(path), **fields)))


def texts(path, **fields):
    return [record["text"] for record in opened(path, **fields)]


def test_text_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\ufeffone\ntwo\n\n \nthree\n", encoding="utf-8")
    assert texts(file) == ["one\ntwo\n\n \nthree\n"]
    assert texts(file, document="line") == ["one", "two", "three"]
    assert texts(file, document="paragraph") == ["one\ntwo", "three\n"]


def test_gzip_and_unknown_suffix_are_read_as_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("hé".encode()))
    (tmp_path / "notes").write_text("plain")
    assert texts(tmp_path / "a.txt.gz") == ["hé"]
    assert texts(tmp_path / "notes") == ["plain"]


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    lines = '{"text": "a\\u2028b", "body": "x"}\n\n{"text": "c", "body": "y"}\n'
    file.write_bytes(gzip.compress(lines.encode()))
    assert texts(file) == ["a\u2028b", "c"]
    assert texts(file, text_field="body") == ["x", "y"]


def test_supervised_columns(tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}]
    file.write_text(json.dumps({"p": "q", "c": "a", "m": turns}))
    assert opened(file, prompt_field="p", completion_field="c") == [{"prompt": "q", "completion": "a"}]
    assert opened(file, messages_field="m") == [{"messages": turns}]


def test_folders_and_globs(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"text": "first"}')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert texts(tmp_path) == ["first", "second"]
    assert texts(tmp_path, format="jsonl") == ["first"]
    assert texts(tmp_path / "*.txt") == ["second"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["first"]
    (tmp_path / "c.bin").unlink()
    assert texts(tmp_path, format="text") == ['{"text": "first"}', "second"]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ('{"text": "a"}\n{oops\n', {}, r"a\.jsonl, line 2: not JSON"),
        ('[{"text": "a"},\n', {}, "looks like one JSON array"),
        ("3\n", {}, "line 1: each line must be a JSON object, got int"),
        ('{"body": "a"}\n', {}, r"line 1: no column 'text'; it has \['body'\]: set text_field"),
        ('{"text": 3}\n', {}, "column 'text' must be a str, got int"),
        ('{"m": "x"}\n', {"messages_field": "m"}, "column 'm' must be a list, got str"),
        ("\n", {}, "has no documents"),
    ],
)
def test_bad_jsonl(tmp_path, content, fields, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        opened(file, **fields)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="set format='hf'"):
        opened(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="has no files of format 'auto'"):
        opened(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        opened(tmp_path / "a.txt")
    (tmp_path / "a.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a\.gz is not UTF-8 text"):
        opened(tmp_path / "a.gz")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="which has no columns"):
        opened(tmp_path / "b.txt", messages_field="m")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "b"]
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; it has \['n', 'text'\]"):
        opened(tmp_path / "a.parquet", text_field="body")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "many")
    records = open_source(SourceConfig(path=str(tmp_path / "one")))
    assert records[-1] == {"text": "c"}
    assert records[:2] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(IndexError, match="record 3 of 3"):
        records[3]
    assert texts(tmp_path / "many", split="test") == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test'\]"):
        opened(tmp_path / "many")
    with pytest.raises(ValueError, match="no column 'body'"):
        opened(tmp_path / "one", text_field="body")


def test_hub_name_goes_through_load_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("owner/name", format="hf", split="validation") == ["a"]
    assert asked == [("owner/name", "validation")]


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "a.parquet"), ("datasets", "x")])
def test_missing_extra_is_named(tmp_path, monkeypatch, module, name):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == module:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "twofold\[data\]"'):
        opened(tmp_path / name, format="hf" if module == "datasets" else "auto")


def test_split_documents():
    train, held_out = split_documents(10, 0.25, seed=3)
    assert sorted(train + held_out) == list(range(10))
    assert len(held_out) == 2
    assert split_documents(10, 0.25, seed=3) == (train, held_out)
    assert any(split_documents(10, 0.25, seed=s)[1] != held_out for s in range(5))
    assert len(split_documents(2, 0.01, 0)[1]) == 1
    assert len(split_documents(2, 0.99, 0)[0]) == 1
    with pytest.raises(ValueError, match="share of 1 document"):
        split_documents(1, 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        split_documents(5, 0, 0)


def test_open_corpora(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i}" for i in range(4)))
    sources = [{"path": str(tmp_path / f"{name}.txt"), "document": "line"} for name in "ab"]
    lengths = {"source_length": 4, "target_length": 4, "rows_per_batch": 1}

    train, held_out = open_corpora(DataConfig(sources=sources, held_out_fraction=0.25, **lengths))
    assert [len(corpus) for corpus in train] == [3, 3]
    assert [len(corpus) for corpus in held_out] == [1, 1]
    kept = [record["text"] for corpus in (*train, *held_out) for record in corpus]
    assert sorted(kept) == [f"{name}{i}" for name in "ab" for i in range(4)]

    train, held_out = open_corpora(DataConfig(sources=sources[:1], held_out=sources[1:], **lengths))
    assert [record["text"] for record in held_out[0]] == ["b0", "b1", "b2", "b3"]
    assert open_corpora(DataConfig(sources=sources, **lengths))[1] == []
