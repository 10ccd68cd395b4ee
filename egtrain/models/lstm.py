"""An LSTM language model (Zaremba et al. 2014, arXiv 1409.2329) with tied embeddings (arXiv
1608.05859).
"""

import warnings

import torch
from torch import Tensor, nn

# On a GPU: the weights of all layers lie in one flat tensor, and cuDNN copies them into an order of
# its own.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")

INITIAL_RANGE = 0.05
"""Half the width of the uniform distribution of all weights, that of Zaremba et al.'s medium
model."""


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM layers of the same width, and an output that shares its weights with the
    embedding.

    Dropout stands before, between and after the layers. It is ours: one `nn.LSTM` a layer, since
    the dropout inside a deeper one keeps a random state of its own on CUDA. With 650 units and 3
    layers on WikiText-2's 33,278 words it has 31,819,578 parameters.

    Args:
        vocabulary: number of words.
        width: units of each layer, and of the embeddings.
        layers: number of LSTM layers.
        dropout: probability of dropping a unit.
        columns: sequences of a worker's mini-batch, whose state is carried from one to the next in
            `hidden`.
    """

    hidden: Tensor
    """State that the worker goes on from, hidden and cell: [layers, 2, columns, width]. The loss
    function writes it."""

    def __init__(
        self, vocabulary: int, *, width: int, layers: int, dropout: float, columns: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.empty(vocabulary))
        self.register_buffer("hidden", torch.zeros(layers, 2, columns, width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.bias)

    def forward(self, words: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map words [length, columns] to logits of the next ones [length, columns, vocabulary], and
        to the new state.

        `state` is [layers, 2, columns, width]; None is a state of zeros.
        """
        if state is None:
            state = self.hidden.new_zeros(
                len(self.layers), 2, words.shape[1], self.hidden.shape[-1]
            )
        outputs = self.dropout(self.embedding(words))
        states = []
        # In bf16, autocast would run cuDNN's LSTM in fp16, without a loss scale, and oneDNN has
        # none on a CPU without native bf16. Most of the time goes into the output anyway.
        with torch.autocast(words.device.type, enabled=False):
            for layer, (hidden, cell) in zip(self.layers, state, strict=True):
                outputs, (hidden, cell) = layer(outputs, (hidden[None], cell[None]))
                outputs = self.dropout(outputs)
                states.append(torch.cat([hidden, cell]))
        return nn.functional.linear(outputs, self.embedding.weight, self.bias), torch.stack(states)
