"""The order in which a run takes its training samples: a function of (seed, worker, step)."""

import torch
from torch import Tensor

from egtrain.errors import UsageError
from egtrain.optim.randomness import generator_for


def steps_in_epoch(samples: int, workers: int, worker_batch_size: int) -> int:
    """Return the number of whole batches of K·b in N samples.

    Raises:
        UsageError: there is none.
    """
    steps = samples // (workers * worker_batch_size)
    if steps == 0:
        raise UsageError(
            f"a batch of {workers} x {worker_batch_size} = {workers * worker_batch_size} is larger "
            f"than the {samples} training samples: take fewer workers or a smaller batch"
        )
    return steps


class Order:
    """Which samples each worker takes at each step.

    An epoch is a new permutation of the samples, split into ⌊N/(K·b)⌋ batches; worker k takes slots
    [k·b, (k+1)·b) of each, and the rest is dropped.

    Args:
        samples: N.
        workers: K.
        worker_batch_size: b.
        seed: the run's.
        device: where the indices are needed.

    Raises:
        UsageError: a batch is larger than the training data.
    """

    def __init__(
        self,
        samples: int,
        workers: int,
        worker_batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.steps_per_epoch = steps_in_epoch(samples, workers, worker_batch_size)
        self._samples = samples
        self._batch_size = workers * worker_batch_size
        self._worker_batch_size = worker_batch_size
        self._seed = seed
        self._device = device
        self._permutation: tuple[int, Tensor] | None = None

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def indices(self, worker: int, step: int) -> Tensor:
        """Return the samples [b] of a worker's mini-batch."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        if self._permutation is None or self._permutation[0] != epoch:
            generator = generator_for(self._seed, "order", epoch, device=self._device)
            self._permutation = (
                epoch,
                torch.randperm(self._samples, generator=generator, device=self._device),
            )
        start = slot * self._batch_size + worker * self._worker_batch_size
        return self._permutation[1][start : start + self._worker_batch_size]

    def extra_indices(self, worker: int, step: int) -> Tensor:
        """Return b independently drawn samples for the step's second gradient."""
        generator = generator_for(self._seed, "extra samples", worker, step, device=self._device)
        return torch.randint(
            self._samples, (self._worker_batch_size,), generator=generator, device=self._device
        )
