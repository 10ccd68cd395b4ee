"""Image classification: cross-entropy and top-1 accuracy, with the data on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egtrain.data.augment import normalise, random_crop_flip
from egtrain.data.images import ImageData
from egtrain.optim.randomness import generator_for
from egtrain.tasks import ACCURACY, Split
from egtrain.tasks.order import Order

Batch = tuple[Tensor, Tensor]

EVALUATION_BATCH = 500
FROZEN_BATCH = 256
"""Smaller, since second derivatives keep the graphs of two passes."""


class ImageTask:
    """Batches, loss and metric of an image classifier.

    Args:
        data: the images; they are moved to the device once.
        workers: K, which share the training images as `Order` says.
        worker_batch_size: b.
        seed: the run's.
        augment: random crops (padded by an eighth of the height: 4 pixels at 32) and horizontal
            flips.

    Raises:
        UsageError: a batch is larger than the training data.
    """

    metric = training_metric = ACCURACY
    sums: tuple[str, ...] = ("nats", "right answers")

    def __init__(
        self,
        data: ImageData,
        *,
        workers: int,
        worker_batch_size: int,
        seed: int,
        augment: bool,
        channels_last: bool,
        device: torch.device,
    ) -> None:
        self.samples = len(data.y_train)
        self._order = Order(self.samples, workers, worker_batch_size, seed, device)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.worker_batch_size = worker_batch_size
        self.batch_size = workers * worker_batch_size
        self.seed = seed
        self.device = device
        self.channels_last = channels_last
        self.mean, self.std = data.mean, data.std
        self.best_possible = data.ceiling
        self.padding = data.x_train.shape[1] // 8 if augment else 0
        self._train = (data.x_train.to(device), data.y_train.to(device))
        self._held_out: dict[Split, Batch] = {
            "validation": (data.x_validation.to(device), data.y_validation.to(device)),
            "test": (data.x_test.to(device), data.y_test.to(device)),
        }

    def batch(self, worker: int, step: int) -> Batch:
        """Return the worker's mini-batch: images [b, 3, height, width] and labels [b]."""
        return self._augmented(self._order.indices(worker, step), "augment", worker, step)

    def extra_batch(self, worker: int, step: int) -> Batch:
        """Return b independently drawn images for the step's second gradient."""
        chosen = self._order.extra_indices(worker, step)
        return self._augmented(chosen, "extra augment", worker, step)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy in nats and the fraction of right answers."""
        images, labels = batch
        logits = model(images).float()
        return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).float().mean()

    def frozen_batches(self, indices: Tensor) -> list[tuple[Batch, int]]:
        """Return these training images [images], not augmented, in batches with their sizes."""
        chosen = torch.split(indices.to(self.device), FROZEN_BATCH)
        return [
            ((self._normalised(self._train[0][part]), self._train[1][part]), len(part))
            for part in chosen
        ]

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples of a split."""
        return len(self._held_out[split][1])

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of evaluation batches of a split."""
        return -(-self.evaluation_size(split) // EVALUATION_BATCH)

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return [cross-entropy in nats, right answers] of one batch, float64."""
        images, labels = (
            t[index * EVALUATION_BATCH : (index + 1) * EVALUATION_BATCH]
            for t in self._held_out[split]
        )
        logits = model(self._normalised(images)).float()
        right = (logits.argmax(1) == labels).sum()
        return torch.stack(
            [F.cross_entropy(logits, labels, reduction="none").double().sum(), right.double()]
        )

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean cross-entropy in nats and the fraction of right answers."""
        nats, right = sums
        images = self.evaluation_size(split)
        return {"loss": nats / images, self.metric.name: right / images}

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images, self.mean, self.std, self.channels_last)

    def _augmented(self, chosen: Tensor, purpose: str, worker: int, step: int) -> Batch:
        images = self._train[0][chosen]
        if self.padding:
            generator = generator_for(self.seed, purpose, worker, step, device=self.device)
            images = random_crop_flip(images, generator, self.padding)
        return self._normalised(images), self._train[1][chosen]
