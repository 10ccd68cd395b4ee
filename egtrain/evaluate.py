"""Evaluation of a model on a held-out split, shared by the ranks, the same for any number of them."""

import torch
import torch.distributed as dist
from torch import nn

from egtrain.tasks import Split, Task
from egtrain.workers import Ranks


def evaluate(task: Task, model: nn.Module, split: Split, ranks: Ranks, precision: str = "fp32") -> dict[str, float]:
    """Return the mean loss and the task's metric over a split; a collective where there are several ranks.

    Each evaluation batch is a slot of its own in the sum over ranks, so the result does not depend on who computed it.
    The model's buffers are used as they are; its training mode is restored.
    """
    sums = torch.zeros(task.evaluation_batches(split), len(task.sums), dtype=torch.float64)
    training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(ranks.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for index in range(ranks.rank, len(sums), ranks.count):
            sums[index] = task.evaluate_batch(model, split, index).cpu()
    model.train(training)
    if ranks.count > 1:
        on_device = sums.to(ranks.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    return task.metrics_of(sums.sum(dim=0).tolist(), split)
