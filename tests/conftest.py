"""Fixtures that several areas share."""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import build, pair_config, stack
from twofold import EncoderDecoder
from twofold.cli import main

# The same examples in every run; `pytest --hypothesis-profile=random` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile("same")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless and without requests of its own. For a module: while it runs, so does an event loop."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=_BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token per byte (0-255), then <|im_start|> 256 and <|im_end|> 257; a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token per word; decoding joins them with spaces."""
    words = ["<unk>", "the", "cat", "sat"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture
def text_model(byte_tokenizer: Any) -> Callable[..., EncoderDecoder]:
    """A tiny random model that takes text; a lossless-style pair unless told otherwise."""

    def make(**changes: Any) -> EncoderDecoder:
        settings = {
            "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
            "decoder_start": "last_source_token", "bos_token_id": 256, "eos_token_ids": (257,), "pad_token_id": 257,
        }  # fmt: skip
        config = pair_config(stack(vocab_size=258, max_position_embeddings=256), **(settings | changes))
        model = build(config)
        model.tokenizer = byte_tokenizer
        return model

    return make


@pytest.fixture
def full_disk_after() -> Callable[[int], AbstractContextManager[None]]:
    """Inside, the system itself refuses to write a file beyond so many bytes, as a quota or a full disk does."""

    @contextmanager
    def limited(n_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Calls the command line in this process; returns exit status, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path_factory: Any, monkeypatch: Any) -> None:
    """Tests keep their tokens to themselves."""
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path_factory.mktemp("tokens")))
