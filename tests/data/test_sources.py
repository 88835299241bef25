import builtins
import gzip
import json

import pytest

from twofold.config.data import SourceConfig
from twofold.data import sources
from twofold.data.sources import BadRecord, SourceReader, parse_record


def opened(path, **fields):
    config = SourceConfig(path=str(path), **fields)
    return [parse_record(raw, config) for raw in SourceReader(config)]


def texts(path, **fields):
    return [record["text"] for record in opened(path, **fields)]


def test_text_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\ufeffone\ntwo\n\n \nthree\n", encoding="utf-8")
    assert texts(file) == ["one\ntwo\n\n \nthree\n"]
    assert texts(file, document="line") == ["one", "two", "three"]
    assert texts(file, document="paragraph") == ["one\ntwo", "three"]


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


def test_templates(tmp_path):
    file = tmp_path / "a.jsonl"
    row = {"task": "Add.", "input": "", "steps": ["one", "two"], "{x}": 1, "n": 3}
    file.write_text(json.dumps(row))
    record = {"prompt": "Add.", "completion": "two: {one two}"}
    fields = {"prompt_template": "{task}\n\n{input}", "completion_template": "{steps[1]}: {{{steps}}}"}
    assert opened(file, **fields) == [record]
    assert opened(file, prompt_template="{task} {task}", completion_field="task") == [
        {"prompt": "Add. Add.", "completion": "Add."}
    ]
    for template, message in (
        ("{steps[2]}", "line 1: column 'steps' has 2 items, item 2"),
        ("{n}", "line 1: column 'n' must be a text or a list of texts, got int"),
        ("{task[0]}", "line 1: column 'task' must be a list of texts, got str"),
    ):
        with pytest.raises(BadRecord, match=message) as error:
            opened(file, prompt_template=template, completion_field="task")
        assert error.value.reason == "wrong type"


def test_parallel_files(tmp_path):
    english, german = tmp_path / "a.en.gz", tmp_path / "a.de"
    english.write_bytes(gzip.compress("\ufeffA dog.\n\nA cat. \n".encode()))
    german.write_text("Ein Hund.\n\nEine Katze.\n", encoding="utf-8")
    fields = {"completion_path": str(german)}
    assert opened(english, **fields) == [
        {"prompt": "A dog.", "completion": "Ein Hund."},
        {"prompt": "A cat.", "completion": "Eine Katze."},
    ]
    assert opened(english, prompt_template="Say {prompt}", **fields)[1]["prompt"] == "Say A cat."
    reader = SourceReader(SourceConfig(path=str(english), **fields))
    assert [raw.where for raw in reader] == [f"{english}, line {n}" for n in (1, 3)]
    assert reader.share_read == 1
    before = reader.identity()
    german.write_text("Ein Hund.\n\n")
    assert SourceReader(SourceConfig(path=str(english), **fields)).identity() != before
    with pytest.raises(ValueError, match=r"as many lines, but .*a.en.gz goes on after line 2"):
        opened(english, **fields)
    with pytest.raises(FileNotFoundError, match="completion_path"):
        opened(english, completion_path=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="goes with one file"):
        opened(tmp_path, completion_path=str(german), format="text")
    english.write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(ValueError, match=r"broken \.gz"):
        opened(english, **fields)


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
    ("content", "fields", "reason", "message"),
    [
        (b'{"text": "a"}\n{oops\n', {}, "not JSON", r"a\.jsonl, line 2: not JSON"),
        (b"3\n", {}, "not an object", "line 1: must be a JSON object, got int"),
        (b'{"body": "a"}\n', {}, "no column", r"line 1: no column 'text'; it has \['body'\]: set text_field"),
        (b'{"text": 3}\n', {}, "wrong type", "column 'text' must be a str, got int"),
        (b'{"text": " "}\n', {}, "empty text", "line 1: empty text"),
        (b'{"text": "\xff"}\n', {}, "not UTF-8", "line 1: not UTF-8"),
        (b'{"m": "x"}\n', {"messages_field": "m"}, "wrong type", "column 'm' must be a list"),
        (b'{"m": [{"role": "user"}]}\n', {"messages_field": "m"}, "wrong type", "with text in both"),
    ],
)
def test_bad_records(tmp_path, content, fields, reason, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadRecord, match=message) as caught:
        opened(file, **fields)
    assert caught.value.reason == reason


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
def test_json_arrays(tmp_path, monkeypatch, window):
    monkeypatch.setattr(sources, "_ARRAY_READ", window)
    rows = [{"text": "a, ]"}, {"text": "\u00e9\n"}, {"text": "c" * 50}]
    for name, content in (("a.json", json.dumps(rows, indent=1)), ("b.jsonl", " " + json.dumps(rows))):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == [row["text"] for row in rows]
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows, ensure_ascii=False).encode()))
    assert texts(tmp_path / "c.json.gz") == [row["text"] for row in rows]
    (tmp_path / "e.json").write_text("[ ]")
    assert texts(tmp_path / "e.json") == []


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text"', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}']
)
def test_broken_json_arrays(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json, item [01]: the JSON array cannot be read on"):
        opened(tmp_path / "a.json")


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="set format='hf'"):
        opened(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="has no files of format 'auto'"):
        opened(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadRecord, match=r"a\.txt: not UTF-8 text"):
        opened(tmp_path / "a.txt")
    (tmp_path / "a.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a\.gz is a broken .gz file"):
        opened(tmp_path / "a.gz")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is a broken .gz file"):
        opened(tmp_path / "cut.txt.gz")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="which has no columns"):
        opened(tmp_path / "b.txt", messages_field="m")


def test_share_read(tmp_path):
    (tmp_path / "a.txt").write_text("x\n" * 40)
    (tmp_path / "b.txt").write_text("x\n" * 60)
    reader = SourceReader(SourceConfig(path=str(tmp_path), document="line"))
    assert reader.share_read == 0
    shares = [reader.share_read for _ in reader]
    assert shares == sorted(shares)
    assert shares[39] == 0.4
    assert reader.share_read == 1


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
    assert texts(tmp_path / "one") == ["a", "b", "c"]
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
