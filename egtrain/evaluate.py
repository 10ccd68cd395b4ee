"""Evaluation on a held-out split, shared by the ranks, the same for any number of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from egtrain.tasks import Split, Task
from egtrain.workers import Ranks, sum_over_ranks


def evaluate(
    task: Task,
    model: nn.Module,
    split: Split,
    ranks: Ranks,
    precision: str = "fp32",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, float]:
    """Return the mean loss and the task's metric over a split; a collective of the ranks.

    Each batch has its slot in the sum over ranks, so the result does not depend on who computed it.
    The model's buffers are used as they are; its training mode is restored. `progress` is called
    with the numbers of batches done and in all.
    """
    sums = torch.zeros(task.evaluation_batches(split), len(task.sums), dtype=torch.float64)
    with evaluating(model, ranks.device, precision):
        for index in range(ranks.rank, len(sums), ranks.count):
            sums[index] = task.evaluate_batch(model, split, index).cpu()
            progress(min(index + ranks.count, len(sums)), len(sums))
    return task.metrics_of(sum_over_ranks(sums, ranks).sum(dim=0).tolist(), split)


@contextmanager
def evaluating(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Hold a model in evaluation mode, without gradients, in the precision of training."""
    training = model.training
    model.eval()
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    if precision == "fp32":
        # PyTorch's default on a GPU is TF32, and this process may not have trained.
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        model.train(training)
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
