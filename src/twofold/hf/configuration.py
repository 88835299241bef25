"""What transformers asks of a model's config.json, around an `EncoderDecoderConfig`."""

from dataclasses import field
from typing import Any, Self

from transformers import PreTrainedConfig

from twofold.config import EncoderDecoderConfig


class TwofoldConfig(PreTrainedConfig):  # type: ignore[misc]
    """`pair` says what the model is; all else follows from it.

    A config.json in twofold's own format is read, too: it is the pair.
    """

    model_type = "twofold"
    keys_to_ignore_at_inference = ("past_key_values",)

    pair: dict[str, Any] = field(default_factory=dict)
    """An `EncoderDecoderConfig` as plain data."""
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pair:
            self.set_pair(EncoderDecoderConfig.model_validate(self.pair))
        super().__post_init__(**kwargs)
        # Every Auto class begins with a configuration, so that its model is known from here on.
        from twofold.hf import modeling  # noqa: F401

    @classmethod
    def of(cls, pair: EncoderDecoderConfig) -> Self:
        """The configuration of a pair."""
        return cls(pair=pair.model_dump(mode="json"))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; also of a config.json in twofold's own format."""
        if "encoder" in config_dict:
            # Before 5.23, transformers adds entries of its own that begin with an underscore.
            own = {k: v for k, v in config_dict.items() if k != "architectures" and not k.startswith("_")}
            config_dict = {"model_type": cls.model_type, "pair": own}
        return super().from_dict(config_dict, **kwargs)

    def set_pair(self, pair: EncoderDecoderConfig) -> None:
        """Take over what a pair is."""
        self.pair = pair.model_dump(mode="json")
        self.tie_word_embeddings = pair.tie_word_embeddings != "none"
        self.pad_token_id, self.bos_token_id = pair.pad_token_id, pair.bos_token_id
        self.eos_token_id = list(pair.eos_token_ids) or None
        # Where decoders start from the last source token, `generate` takes it from the source.
        self.decoder_start_token_id = pair.bos_token_id if pair.decoder_start == "bos" else None

    def read_pair(self) -> EncoderDecoderConfig:
        """`pair`, checked.

        Raises:
            ValueError: there is none, or it is not valid.
        """
        if not self.pair:
            raise ValueError(
                "this TwofoldConfig has no pair; make one with TwofoldConfig.of(EncoderDecoderConfig(...))"
            )
        return EncoderDecoderConfig.model_validate(self.pair)

    def get_text_config(self, *_: Any, **__: Any) -> Self:
        """Itself: there is no other."""
        return self

    def _of_decoder(self, name: str) -> Any:
        return self.pair["decoder"][name] if self.pair else None

    @property
    def vocab_size(self) -> int:
        """Of both sides."""
        size: int = self._of_decoder("vocab_size")
        return size

    @property
    def hidden_size(self) -> int:
        """Of the decoder."""
        size: int = self._of_decoder("hidden_size")
        return size

    @property
    def num_hidden_layers(self) -> int:
        """Of the decoder."""
        n_layers: int = self._of_decoder("num_hidden_layers")
        return n_layers

    @property
    def num_attention_heads(self) -> int:
        """Of the decoder."""
        n_heads: int = self._of_decoder("num_attention_heads")
        return n_heads

    @property
    def max_position_embeddings(self) -> int:
        """Of the decoder."""
        limit: int = self._of_decoder("max_position_embeddings")
        return limit
