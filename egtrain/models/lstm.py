"""An LSTM language model (Zaremba et al. 2014, arXiv 1409.2329)."""

import warnings

import torch
from torch import Tensor, nn

# On a GPU cuDNN warns, since it must copy the weights from our flat tensor into its order.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")

INITIAL_RANGE = 0.05
"""Half the width of the uniform distribution of weights, as in Zaremba et al.'s medium model."""


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM layers, and an output with the embedding's weights (arXiv 1608.05859).

    All have the same width. Dropout is before, between and after the layers. Each layer is one
    `nn.LSTM`, since the dropout inside a deeper `nn.LSTM` has its own random state on CUDA. With
    650 units and 3 layers on WikiText-2's 33,278 words it has 31,819,578 parameters.

    Args:
        vocabulary: number of words.
        width: units of each layer, and of the embeddings.
        layers: number of LSTM layers.
        dropout: probability of dropping a unit.
        columns: sequences in a worker's mini-batch; `hidden` carries their state to the next one.
    """

    hidden: Tensor
    """The state from which the worker continues, hidden and cell: [layers, 2, columns, width]. The
    loss function writes it; it belongs to the worker, and is none of the weights."""

    def __init__(
        self, vocabulary: int, *, width: int, layers: int, dropout: float, columns: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.empty(vocabulary))
        self.register_buffer("hidden", torch.zeros(layers, 2, columns, width), persistent=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.bias)

    def forward(self, words: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map words [length, columns] to next words' logits, and to the new state.

        Logits are [length, columns, vocabulary], `state` is [layers, 2, columns, width]; None is a
        state of zeros.
        """
        if state is None:
            state = self.hidden.new_zeros(
                len(self.layers), 2, words.shape[1], self.hidden.shape[-1]
            )
        outputs = self.dropout(self.embedding(words))
        states = []
        # In fp32: under bf16 autocast cuDNN's LSTM would run in fp16, without a loss scale, and
        # oneDNN has no LSTM for CPUs without native bf16. Most time goes into the output anyway.
        with torch.autocast(words.device.type, enabled=False):
            for layer, (hidden, cell) in zip(self.layers, state, strict=True):
                outputs, (hidden, cell) = layer(outputs, (hidden[None], cell[None]))
                outputs = self.dropout(outputs)
                states.append(torch.cat([hidden, cell]))
        return nn.functional.linear(outputs, self.embedding.weight, self.bias), torch.stack(states)
