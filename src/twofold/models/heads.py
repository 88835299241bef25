"""What else an encoder can do: classify its input, or embed it.

Letters: B batch, S source tokens, E encoder width, C labels.
"""

import torch
from torch import Tensor, nn

from twofold.models.encoder_decoder import EncoderDecoder, EncoderModel, locate_tokens
from twofold.models.masks import Tokens


def last_token(hidden_BSE: Tensor, tokens: Tokens) -> Tensor:
    """[B, E]: the hidden state of the last real token of each row.

    Raises:
        ValueError: a row has no real token.
    """
    is_real_BS = tokens.segments > 0
    if not bool(is_real_BS.any(dim=1).all()):
        raise ValueError("a row has no real token to pool; every source needs at least one")
    index_BS = torch.arange(is_real_BS.shape[1], device=is_real_BS.device).expand_as(is_real_BS)
    last_B = torch.where(is_real_BS, index_BS, -1).amax(dim=1)
    return hidden_BSE[torch.arange(len(last_B), device=last_B.device), last_B]


def mean_pooled(hidden_BSE: Tensor, tokens: Tokens) -> Tensor:
    """[B, E]: the mean of the hidden states of each row's real tokens, summed in float32.

    Raises:
        ValueError: a row has no real token.
    """
    weights_BS1 = (tokens.segments > 0)[..., None].float()
    n_real = weights_BS1.sum(dim=1)
    if not bool((n_real > 0).all()):
        raise ValueError("a row has no real token to pool; every source needs at least one")
    return ((hidden_BSE.float() * weights_BS1).sum(dim=1) / n_real).to(hidden_BSE.dtype)


def embed(model: EncoderDecoder, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """One vector per source text, [B, E]: mean-pooled encoder output. Arguments as `EncoderDecoder.forward`."""
    output = model.encode(input_ids, attention_mask)
    return mean_pooled(output.last_hidden_state, output.tokens)


class ClassificationHead(nn.Module):
    """Dropout and one linear layer, with the parameter names of T5Gemma's `score`."""

    def __init__(self, hidden_size: int, num_labels: int, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_proj(self.dropout(x))
        return out


class EncoderClassifier(EncoderModel):
    """A sequence classifier on the last encoder token (arXiv 2504.06225, SuperGLUE protocol).

    Args:
        model: its encoder is used, and trained with the head; the decoder is not kept.
        num_labels: C.
        dropout_rate: of the head; default: the config's `classifier_dropout_rate`.
    """

    new_modules = ("score",)

    def __init__(self, model: EncoderDecoder, num_labels: int, *, dropout_rate: float | None = None) -> None:
        super().__init__(model.config)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        self.tokenizer, self.adaptation, self.history = model.tokenizer, model.adaptation, model.history
        self.encoder = model.encoder
        rate = model.config.classifier_dropout_rate if dropout_rate is None else dropout_rate
        self.score = ClassificationHead(model.config.encoder.hidden_size, num_labels, rate)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Label logits float [B, C]. Arguments as `EncoderDecoder.forward`."""
        output = self.encoder(input_ids, locate_tokens(self.config, "encoder", input_ids, attention_mask))
        logits_BC: Tensor = self.score(last_token(output.last_hidden_state, output.tokens))
        return logits_BC
