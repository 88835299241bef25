"""A model, a tokenizer and texts so small that a run takes a second."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import pair_config, stack
from twofold.checkpoint.save import save
from twofold.config.data import DataConfig
from twofold.config.recipe import Recipe, TrainSettings
from twofold.data import Convention, Corpus, Loader
from twofold.models import EncoderDecoder

VOCAB = 259
PAD, EOS, BOS = 256, 257, 258
TEXTS = [
    f"text {n}: the quick brown fox jumps {n * n} times over the lazy dog. " * (1 + n % 3) for n in range(12)
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 0-255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<eos>", "<bos>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def tiny_model(seed: int = 0, *, dropout: float = 0.0, **meeting: Any) -> EncoderDecoder:
    """Two layers on each side, width 32, with the byte tokenizer; in eval mode, as `load` gives it."""
    side = stack(
        vocab_size=VOCAB,
        num_hidden_layers=2,
        layer_types=("full_attention", "sliding_attention"),
        sliding_window=8,
        max_position_embeddings=128,
        dropout_rate=dropout,
        attention_dropout=dropout,
    )
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_ids": (EOS,)}
    model = EncoderDecoder(pair_config(side, **(special | meeting)))
    model.initialise_randomly(seed)
    model.tokenizer = byte_tokenizer()
    return model.eval()


def data_config(path: str = "unused", **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "sources": [{"path": path, "format": "text", "document": "line"}],
        "source_length": 24,
        "target_length": 24,
        "rows_per_batch": 2,
    }
    return DataConfig(**(settings | changes))


def loader(
    model: EncoderDecoder, texts: list[str] = TEXTS, *, num_streams: int = 1, **changes: Any
) -> Loader:
    convention = Convention.of(model.config)
    corpus = Corpus.from_records([{"text": text} for text in texts], model.tokenizer, convention)
    return Loader([corpus], model.tokenizer, data_config(**changes), convention, num_streams=num_streams)


def settings(**changes: Any) -> TrainSettings:
    """Six steps on the CPU, without TensorBoard."""
    values: dict[str, Any] = {
        "steps": 6,
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "tensorboard": False,
        "device": "cpu",
    }
    return TrainSettings(**(values | changes))


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe for a tiny model saved in `folder`, and texts there; output is `folder / "run"`."""
    if not (folder / "start").exists():
        save(tiny_model(dropout=0.1), folder / "start")
        (folder / "texts.txt").write_text("\n".join(TEXTS))
    data = {
        "sources": [{"path": str(folder / "texts.txt"), "document": "line"}],
        "held_out_fraction": 0.2,
        "source_length": 24,
        "target_length": 24,
        "rows_per_batch": 2,
    }
    values: dict[str, Any] = {
        "stage": "pretrain",
        "model": {"path": str(folder / "start")},
        "data": data | changes.pop("data", {}),
        "output": str(folder / "run"),
        "steps": 6,
        "accumulate_batches": 2,
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "evaluate_every": 2,
        "tensorboard": False,
        "device": "cpu",
    }
    return Recipe(**(values | changes))
