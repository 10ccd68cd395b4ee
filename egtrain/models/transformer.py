"""A pre-norm Transformer (Vaswani et al. 2017, arXiv 1706.03762; pre-norm: arXiv 2002.04745)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0


class Attention(nn.Module):
    """Multi-head attention from one sequence (queries) to the same or another (keys, values)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def keys_and_values(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Map [batch, length, width] to keys and values [batch, heads, length, head width]."""
        keys, values = self.key_value(sequence).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Map queries [batch, length, width] to the same shape; `mask` is added to the scores."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(queries)), keys, values, attn_mask=mask, is_causal=causal
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, sequence: Tensor) -> Tensor:
        batch, length, width = sequence.shape
        return sequence.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward part, each with normalised input and a shortcut."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feedforward = FeedForward(width, feedforward)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor, mask: Tensor | None) -> Tensor:
        """Map [batch, length, width] to the same shape."""
        normed = self.attention_norm(sequence)
        sequence = sequence + self.dropout(
            self.attention(normed, *self.attention.keys_and_values(normed), mask)
        )
        result: Tensor = sequence + self.dropout(self.feedforward(sequence))
        return result


class FeedForward(nn.Module):
    """Normalisation, then two linear layers with a ReLU between them."""

    def __init__(self, width: int, feedforward: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, feedforward)
        self.outer = nn.Linear(feedforward, width)

    def forward(self, sequence: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        result: Tensor = self.outer(F.relu(self.inner(self.norm(sequence))))
        return result


class DecoderLayer(nn.Module):
    """An encoder layer with attention to the source in the middle."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.source_norm = nn.LayerNorm(width)
        self.source_attention = Attention(width, heads)
        self.feedforward = FeedForward(width, feedforward)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Map the target [batch, length, width] to the same shape; attention is causal."""
        normed = self.attention_norm(sequence)
        keys_and_values = self.attention.keys_and_values(normed)
        sequence = sequence + self.dropout(self.attention(normed, *keys_and_values, causal=True))
        return self._rest(sequence, self.source_attention.keys_and_values(memory), mask)

    def step(self, place: Tensor, state: "LayerState", mask: Tensor | None) -> Tensor:
        """Map the target's next position [batch, 1, width]; add its key and value to the state."""
        normed = self.attention_norm(place)
        keys, values = self.attention.keys_and_values(normed)
        if state.keys is not None and state.values is not None:
            keys, values = (
                torch.cat([state.keys, keys], dim=2),
                torch.cat([state.values, values], dim=2),
            )
        state.keys, state.values = keys, values
        place = place + self.dropout(self.attention(normed, keys, values))
        return self._rest(place, (state.source_keys, state.source_values), mask)

    def _rest(self, sequence: Tensor, source: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        normed = self.source_norm(sequence)
        sequence = sequence + self.dropout(self.source_attention(normed, *source, mask))
        result: Tensor = sequence + self.dropout(self.feedforward(sequence))
        return result


@dataclass
class LayerState:
    """A decoder layer's keys and values so far, [batch, heads, length, head width]."""

    source_keys: Tensor
    source_values: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class DecoderState:
    """The state of sentences in the middle of their translation."""

    layers: list[LayerState]
    mask: Tensor | None
    length: int = 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows [sentences] in this order; one may be kept several times."""
        for layer in self.layers:
            layer.source_keys, layer.source_values = (
                layer.source_keys[rows],
                layer.source_values[rows],
            )
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


class Transformer(nn.Module):
    """Maps sentences of subwords to the logits of their translations' subwords.

    Source, target and output share one embedding, which is scaled by √width for inputs. Positions
    are sines and cosines. Dropout is on the embeddings and on the output of each part of a layer,
    not on attention weights. Matrices are initialised as by Glorot & Bengio (2010), embeddings with
    variance 1/width, biases with zero.

    Args:
        vocabulary: number of subwords, `PAD` included.
        width: units per position; a multiple of twice the heads.
        heads: of each attention.
        layers: of the encoder, and of the decoder.
        feedforward: units inside a feed-forward part.
        dropout: probability of dropping a unit.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, heads, feedforward, dropout) for _ in range(layers)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, heads, feedforward, dropout) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Map source [batch, source length], target [batch, length] to the next subwords' logits.

        The logits are [batch, length, vocabulary]; the target begins with a subword for the
        beginning of a sentence.
        """
        memory, mask = self._encode(source)
        sequence = self._embedded(target, 0)
        for layer in self.decoder:
            sequence = layer(sequence, memory, mask)
        return F.linear(self.decoder_norm(sequence), self.embedding.weight)

    def begin(self, source: Tensor) -> DecoderState:
        """Return the state before the translation's first subword; source is [batch, length]."""
        memory, mask = self._encode(source)
        states = [
            LayerState(*layer.source_attention.keys_and_values(memory))  # type: ignore[union-attr, operator]
            for layer in self.decoder
        ]
        return DecoderState(states, mask)

    def step(self, subwords: Tensor, state: DecoderState) -> Tensor:
        """Add a subword to each translation [batch]; return the next logits [batch, vocabulary]."""
        place = self._embedded(subwords[:, None], state.length)
        for layer, remembered in zip(self.decoder, state.layers, strict=True):
            place = layer.step(place, remembered, state.mask)  # type: ignore[operator]
        state.length += 1
        return F.linear(self.decoder_norm(place[:, 0]), self.embedding.weight)

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        sequence = self._embedded(source, 0)
        # Added to the scores: minus infinity for padding, else zero.
        mask = torch.zeros_like(source, dtype=sequence.dtype).masked_fill_(
            source == PAD, -math.inf
        )[:, None, None]
        for layer in self.encoder:
            sequence = layer(sequence, mask)
        return self.encoder_norm(sequence), mask

    def _embedded(self, subwords: Tensor, first: int) -> Tensor:
        weights = self.embedding.weight
        positions = sinusoids(first, subwords.shape[1], self.width, weights.device).to(
            weights.dtype
        )
        embedded: Tensor = self.dropout(
            self.embedding(subwords) * math.sqrt(self.width) + positions
        )
        return embedded


def sinusoids(first: int, length: int, width: int, device: torch.device) -> Tensor:
    """Return the sines, then cosines, of positions from `first` on, float32 [length, width]."""
    # Not a buffer, since every worker has its own floating-point buffers.
    position = torch.arange(first, first + length, device=device, dtype=torch.float32)
    rate = torch.exp(
        torch.arange(width // 2, device=device, dtype=torch.float32)
        * (-math.log(10_000.0) / (width // 2))
    )
    angle = position[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)
