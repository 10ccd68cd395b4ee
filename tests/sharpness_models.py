"""Small models whose sharpness is known: quadratics, and nets that can be differentiated as a
whole.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.workers import Ranks

Batches = list[tuple[Any, int]]


class Quadratic(nn.Module):
    """½(w − a)ᵀA(w − a), whatever the batch."""

    def __init__(self, matrix: Tensor, minimum: Tensor, at: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.minimum = minimum
        self.w = nn.Parameter(at.clone())

    def forward(self) -> Tensor:
        """Return the value."""
        away = self.w - self.minimum
        return 0.5 * (away @ (self.matrix @ away))


def quadratic(
    matrix: Tensor, minimum: Tensor | None = None, at: Tensor | None = None
) -> FrozenLoss:
    """Return a quadratic as a loss; at its minimum, zero, unless said otherwise."""
    zero = torch.zeros(len(matrix), dtype=matrix.dtype)
    minimum = zero if minimum is None else minimum
    model = Quadratic(matrix, minimum, minimum if at is None else at)
    return FrozenLoss(
        model, lambda model, batch: (model(), torch.zeros(())), [(None, 3), (None, 5)]
    )


def symmetric(spectrum: Sequence[float]) -> Tensor:
    """Return a matrix with these eigenvalues in random directions, float64."""
    generator = torch.Generator().manual_seed(1)
    size = len(spectrum)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = rotation @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ rotation.T
    return (matrix + matrix.T) / 2


class Attention(nn.Module):
    """Inputs [batch, 6] as two positions of three numbers, fused attention, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 6)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs [batch, 3]."""
        query, key, value = self.project(inputs.view(-1, 1, 2, 3)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).flatten(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Inputs [batch, 6] as two steps of three numbers, an LSTM, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs [batch, 3]."""
        return self.head(self.lstm(inputs.view(-1, 2, 3))[0][:, -1])  # type: ignore[no-any-return]


def net(name: str) -> nn.Module:
    """Return a net of inputs [batch, 6] and outputs [batch, 3] with under 500 weights, in training
    mode, float64.
    """
    torch.manual_seed(3)
    nets = {
        "tanh": lambda: nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
        ),
        "relu": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 2),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        "attention": Attention,
        "lstm": Recurrent,
        "encoder": lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2)),
            nn.TransformerEncoderLayer(2, 1, 4, batch_first=True),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
    }
    model = nets[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


def rescale(model: nn.Module, factor: float) -> None:
    """Multiply the first layer of a ReLU net and divide the second: the function stays as it is."""
    first, _, second = model.children()
    with torch.no_grad():
        first.weight.mul_(factor)  # type: ignore[union-attr, operator]
        first.bias.mul_(factor)  # type: ignore[union-attr, operator]
        second.weight.div_(factor)  # type: ignore[union-attr, operator]


def samples(count: int = 100) -> tuple[Tensor, Tensor]:
    """Return inputs [count, 6] and labels [count] of three classes, float64."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)


def batches_of(data: tuple[Tensor, Tensor], size: int) -> Batches:
    """Return batches of the data; the last may be smaller."""
    pairs = zip(data[0].split(size), data[1].split(size), strict=True)
    return [((inputs, labels), len(labels)) for inputs, labels in pairs]


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy."""
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]), (
        logits.detach().argmax(1) == batch[1]
    ).double().mean()


def frozen(model: nn.Module, size: int = 40, ranks: Ranks | None = None) -> FrozenLoss:
    """Return the loss of a net over 100 samples."""
    return FrozenLoss(model, classification, batches_of(samples(), size), ranks)


def hessian(model: nn.Module) -> Tensor:
    """Return the Hessian [size, size] of a net over the 100 samples, in evaluation mode, by
    torch.autograd.
    """
    inputs, labels = samples()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [p.detach() for p in model.parameters() if p.requires_grad]

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in weights])
        pieces = {
            name: part.view(w.shape) for name, part, w in zip(names, parts, weights, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(model, pieces, (inputs,)), labels)

    training = model.training
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        matrix: Tensor = torch.autograd.functional.hessian(
            of, torch.cat([w.reshape(-1) for w in weights])
        )  # type: ignore[assignment]
    model.train(training)
    return matrix


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all that measuring must leave as it was: the model's state and torch's
    settings.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(
            f"{name} {tensor.requires_grad} {tensor.grad is None} "
            f"{id(tensor)} {tensor.data_ptr()}".encode()
        )
        digest.update(tensor.detach().numpy().tobytes())
    backends: Any = torch.backends
    settings = [
        [module.training for module in model.modules()],
        [
            module.momentum
            for module in model.modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        ],
        [
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
            backends.cudnn.rnn.fp32_precision,
        ],
        [
            backends.mkldnn.matmul.fp32_precision,
            backends.cudnn.enabled,
            backends.mha.get_fastpath_enabled(),
        ],
        [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ],
        [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), digest.hexdigest()],
        [torch.get_rng_state().tolist()],
    ]
    return repr(settings)
