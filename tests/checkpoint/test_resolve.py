"""Finding checkpoints on disk and on the hub, and their tokenizers."""

import json
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from twofold.checkpoint import GGUFSource, copy_tokenizer, gguf_config, resolve, same_tokenizer

TOKENS = ["<s>", "a", "b", "c", "ab", "bc"]
MERGES = [("a", "b"), ("b", "c")]


@pytest.fixture
def make_folder(tmp_path, save_tokenizer):
    """A model folder: name, config, tokens of its tokenizer or None, merges."""

    def make(name="model", config=None, tokens=TOKENS, merges=MERGES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        if tokens is not None:
            save_tokenizer(folder, tokens, merges)
        return folder

    return make


def test_folder(make_folder):
    folder = make_folder(config={"model_type": "twofold", "vocab_size": 6})
    for given in (folder, str(folder)):
        checkpoint = resolve(given)
        assert (checkpoint.folder, checkpoint.gguf_file, checkpoint.name) == (folder, None, "model")
        assert checkpoint.config == {"model_type": "twofold", "vocab_size": 6}
        with checkpoint.tensors() as source:
            assert source.get("w").tolist() == [1, 1]


def test_home_and_relative_paths(make_folder, monkeypatch):
    folder = make_folder()
    monkeypatch.chdir(folder)
    assert resolve(".").name == "model"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model").folder == folder


@pytest.mark.parametrize("give_folder", [True, False])
def test_gguf_file_and_folder_with_one(write_gguf, give_folder):
    path = write_gguf("qwen2")
    checkpoint = resolve(path.parent if give_folder else path)
    assert (checkpoint.folder, checkpoint.gguf_file, checkpoint.name) == (path.parent, path, "tiny")
    assert checkpoint.config == gguf_config(path)
    assert isinstance(checkpoint.tensors(), GGUFSource)


def test_config_json_comes_before_a_gguf_file(make_folder):
    folder = make_folder()
    (folder / "other.gguf").touch()
    assert resolve(folder).gguf_file is None


def test_several_gguf_files_are_ambiguous(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"2 GGUF files .*a\.gguf, b\.gguf"):
        resolve(tmp_path)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor a \.gguf file"):
        resolve(tmp_path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"a file but not a \.gguf file"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["{not json", "[]"])
def test_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["nothing", "/no/such/folder", "./no/folder", "a/b/c", "org/file.gguf", "../x", "org/", "org/na me"],
)
def test_what_is_neither_a_path_nor_a_hub_name(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="or a hub name like org/name"):
        resolve(name)


def test_hub_name_downloads_no_pickles(make_folder, monkeypatch):
    folder = make_folder()
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = resolve("some-org/Model.v1")
    assert (checkpoint.name, checkpoint.folder) == ("some-org/Model.v1", folder)
    wanted = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "merges.txt",
    ]
    wanted += [
        "model.safetensors.index.json",
        "tokenizer.model",
        "generation_config.json",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "code.py",
    ]
    filtered = list(
        huggingface_hub.utils.filter_repo_objects(wanted + unwanted, allow_patterns=asked[checkpoint.name])
    )
    assert filtered == wanted


def no_response(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's own words")
    return error


@pytest.mark.parametrize(
    "kind", [GatedRepoError, HFValidationError, LocalEntryNotFoundError, ConnectionError]
)
def test_hub_failures_say_what_to_do(monkeypatch, kind):
    def snapshot_download(*args, **options):
        raise no_response(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        FileNotFoundError, match=r"org/model .*Download it by hand .*licence.*huggingface.co/org/model"
    ):
        resolve("org/model")


def test_tokenizer(make_folder):
    tokenizer = resolve(make_folder(config={"model_type": "twofold"})).tokenizer()
    assert tokenizer("abc")["input_ids"] == [4, 3]


def test_tokenizer_without_its_config_file(make_folder):
    folder = make_folder(config={"model_type": "twofold"})
    (folder / "tokenizer_config.json").unlink()
    assert resolve(folder).tokenizer()("abc")["input_ids"] == [4, 3]


def test_folder_without_tokenizer_warns(make_folder, write_gguf):
    with pytest.warns(UserWarning, match="model has no tokenizer files.*not text"):
        assert resolve(make_folder(tokens=None)).tokenizer() is None
    with pytest.warns(UserWarning, match="tiny has no tokenizer files"):
        assert resolve(write_gguf("llama")).tokenizer() is None


def test_remote_code_is_refused_without_asking(make_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    folder = make_folder(config={"model_type": "strange"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tok.Tok", None]}
    settings["tokenizer_class"] = "Tok"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tok.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        resolve(folder).tokenizer()


def test_copy_tokenizer_copies_tokenizer_files_only(make_folder, tmp_path):
    folder = make_folder()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_tokenizer(resolve(folder), out)
    assert sorted(path.name for path in copied) == sorted(path.name for path in out.iterdir())
    assert sorted(path.name for path in copied) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in copied)
    with pytest.raises(FileExistsError, match=r"already has tokenizer\.json"):
        copy_tokenizer(resolve(folder), out)


def test_copy_tokenizer_without_one_writes_nothing(make_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert copy_tokenizer(resolve(make_folder(tokens=None)), tmp_path / "out") == []


def test_same_tokenizer(make_folder):
    a, b = resolve(make_folder("a")), resolve(make_folder("b"))
    assert same_tokenizer(a, b) is None
    assert same_tokenizer(a, a) is None


def test_different_vocabularies(make_folder):
    a, b = (
        resolve(make_folder("a")),
        resolve(make_folder("b", tokens=["<s>", "a", "c", "b", "ab", "bc", "d"])),
    )
    assert same_tokenizer(a, b) == (
        "the vocabularies differ in 3 ids (a has 6 tokens, b 7); the first is id 2: 'b' in a, 'c' in b"
    )


@pytest.mark.parametrize(
    ("merges", "difference"),
    [
        ([("b", "c"), ("a", "b")], "(a has 2, b 2); the first difference is merge 0: 'a b' in a, 'b c' in b"),
        ([("a", "b")], "(a has 2, b 1); the first difference is merge 1: 'b c' in a, nothing in b"),
    ],
)
def test_different_merges(make_folder, merges, difference):
    a, b = resolve(make_folder("a")), resolve(make_folder("b", merges=merges))
    assert same_tokenizer(a, b) == f"the vocabularies are equal, the merges are not {difference}"


def test_one_tokenizer_missing(make_folder):
    a, b = resolve(make_folder("a")), resolve(make_folder("b", tokens=None))
    for pair in ((a, b), (b, a)):
        assert same_tokenizer(*pair).startswith("b has no tokenizer files to compare with those of a")


def test_both_tokenizers_missing(make_folder):
    sizes = {"a": 10, "b": 10, "c": 12}
    a, b, c = (resolve(make_folder(name, {"vocab_size": size}, tokens=None)) for name, size in sizes.items())
    with pytest.warns(UserWarning, match="neither a nor b has tokenizer files"):
        assert same_tokenizer(a, b) is None
    with pytest.warns(UserWarning, match="neither"):
        assert same_tokenizer(a, c) == "vocab_size is 10 in a, 12 in c"


def test_the_same_folder_needs_no_comparison(make_folder):
    checkpoint = resolve(make_folder(tokens=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_tokenizer(checkpoint, checkpoint) is None


@pytest.mark.smollm2
def test_smollm2_tokenizer_is_converted_and_stays_the_same(smollm2: Path, tmp_path):
    donor = resolve(smollm2.parent)
    assert donor.gguf_file == smollm2
    copied = copy_tokenizer(donor, tmp_path)
    assert "tokenizer.json" in [path.name for path in copied]
    (tmp_path / "config.json").write_text("{}")
    converted = resolve(tmp_path)
    assert same_tokenizer(donor, converted) is None
    text = "Two stacks: one reads, one writes. Größe 12\n"
    tokenizer = converted.tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
