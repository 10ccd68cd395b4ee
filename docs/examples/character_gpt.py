"""A character-level GPT: a small Transformer that predicts each character from those before it.

egtrain train --task character_gpt.py --preset eg-adam --batch-size 64 \
    --set worker_batch_size=16 --set optimizer.lr=0.01 --set schedule.decay=cosine \
    --set schedule.warmup_epochs=1 --set threads=1 --epochs 4 --output runs/gpt

Add --set task.text=FILE for a text of yours; the default is Python's help() on the language.
"""

import math
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

metric, higher_is_better = "bits", False  # per character


@lru_cache
def read(text):
    """Return the characters that occur, and the text as their numbers."""
    content = Path(text).read_text("utf-8") if text else "\n".join(topics.values())
    characters = sorted(set(content))
    number = {character: n for n, character in enumerate(characters)}
    return characters, torch.tensor([number[character] for character in content])


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each added to what comes in."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):  # [batch, characters, width]
        parts = self.query_key_value(self.before_attention(x)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.before_perceptron(x))


class GPT(nn.Module):
    def __init__(self, characters, context, width, heads, layers):
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, x):  # [batch, characters] -> [batch, characters, logits]
        return self.head(self.blocks(self.characters(x) + self.places.weight[: x.shape[1]]))


def model(text: str = "", context: int = 64, width: int = 64, heads: int = 4, layers: int = 2):
    return GPT(len(read(text)[0]), context, width, heads, layers)


def dataset(split, text: str = "", context: int = 64):
    numbers = read(text)[1]
    first, last = {"train": (0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1)}[split]
    part = numbers[int(first * len(numbers)) : int(last * len(numbers))]
    return TensorDataset(part.unfold(0, context + 1, context))


def loss(model, batch):
    (windows,) = batch
    logits = model(windows[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return nats, {"bits": nats / math.log(2)}
