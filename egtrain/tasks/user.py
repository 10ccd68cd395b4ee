"""The task of a task file: its data, its loss and its metrics, in batches of a run."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egtrain.data.user import UserData
from egtrain.errors import UsageError
from egtrain.optim.randomness import seed_for
from egtrain.tasks import LOSS, Split
from egtrain.tasks.contract import loss_of, metric_of, other_metrics, without_graph
from egtrain.tasks.loading import (
    Batches,
    Key,
    fetched,
    on_device,
    set_random_state,
)
from egtrain.tasks.order import Order

FROZEN_SEED = 0
"""Compared runs of all seeds see the same samples, augmented in the same way."""


class Place(NamedTuple):
    """Which batch of a run: a worker's at a step."""

    worker: int
    step: int


class UserTask:
    """Batches, loss and metrics of a task file.

    Args:
        data: the data sets, after `try_out`. One that consists of tensors lives on the device,
            others are fetched by index.
        workers: K, which share the training samples as `Order` says.
        worker_batch_size: b, which is also the size of evaluation batches.
        seed: the run's.
        loaders: processes that fetch samples for this rank.
        carried: the workers of this rank, whose batches are asked for in this order.
        sharing: the number of ranks that evaluate a split, each every so many batches.
        device: where the batches go.

    Raises:
        UsageError: a batch is larger than the training data, or there can be no loaders here.
    """

    best_possible: float | None = None

    def __init__(
        self,
        data: UserData,
        *,
        workers: int,
        worker_batch_size: int,
        seed: int,
        loaders: int,
        channels_last: bool,
        carried: range,
        sharing: int,
        device: torch.device,
    ) -> None:
        assert data.metrics is not None, "try_out comes first"
        self.metric = self.training_metric = metric_of(data.file, data.metrics)
        self._names = data.metrics
        self.sums = ("loss", *data.metrics)
        self.samples = data.size("train")
        self.worker_batch_size = worker_batch_size
        self.batch_size = workers * worker_batch_size
        self.seed = seed
        if loaders and sys.platform != "linux":
            raise UsageError(
                "data.loaders above 0 needs Linux, where processes can share a data set as it is: "
                "set it to 0"
            )
        self._data = data
        self._device = device
        self._channels_last = channels_last
        self._tensors = {
            split: [self._moved(tensor) for tensor in tensors]
            for split in data.datasets
            if (tensors := data.tensors(split)) is not None
        }
        place = device if "train" in self._tensors else "cpu"
        self._order = Order(self.samples, workers, worker_batch_size, seed, place)
        self.steps_per_epoch = self._order.steps_per_epoch

        def next_place(place: Place) -> Place:
            if place.worker + 1 in carried:
                return Place(place.worker + 1, place.step)
            return Place(carried.start, place.step + 1)

        def next_held_out(split: Split, index: int) -> int | None:
            following = index + sharing
            return following if following < self.evaluation_batches(split) else None

        ahead = partial(Batches, loaders=loaders, pinned=device.type == "cuda")
        self._train = ahead(self._fetch_training, next_place)
        self._extra = ahead(self._fetch_extra, next_place)
        splits: tuple[Split, ...] = ("validation", "test")
        self._held_out = {
            split: ahead(partial(self._fetch_held_out, split), partial(next_held_out, split))
            for split in splits
        }

    def batch(self, worker: int, step: int) -> Any:
        """Return the worker's mini-batch of b samples for a step."""
        if "train" in self._tensors:
            return self._rows("train", self._order.indices(worker, step))
        return self._moved(self._train.at(Place(worker, step)))

    def extra_batch(self, worker: int, step: int) -> Any:
        """Return b independently drawn samples for the step's second gradient."""
        if "train" in self._tensors:
            return self._rows("train", self._order.extra_indices(worker, step))
        return self._moved(self._extra.at(Place(worker, step)))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss with its graph, and the metric that counts without one."""
        # As the loop has set torch's, for this worker and step.
        set_random_state(torch.initial_seed())
        loss, values = loss_of(self._data, model, batch)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise without_graph(self._data.file)
        if self.metric is LOSS:
            return loss, loss.detach()
        return loss, self._checked(values)[self._names.index(self.metric.name)]

    def frozen_batches(self, indices: Tensor) -> list[tuple[Any, int]]:
        """Return these training samples [samples] in batches with their sizes.

        What a data set draws at random is drawn once, in the same way for all runs.
        """
        if "train" in self._tensors:
            place = self._tensors["train"][0].device
            parts = torch.split(indices.to(place), self.worker_batch_size)
            return [(self._rows("train", part), len(part)) for part in parts]
        return [
            (
                self._moved(
                    fetched(
                        self._data, "train", Key("frozen sample", (), part.tolist()), FROZEN_SEED
                    )
                ),
                len(part),
            )
            for part in torch.split(indices.cpu(), self.worker_batch_size)
        ]

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples of a split."""
        return self._data.size(split)

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of evaluation batches of a split."""
        return -(-self.evaluation_size(split) // self.worker_batch_size)

    def evaluation_batch(self, split: Split, index: int) -> Any:
        """Return an evaluation batch on the device."""
        if split not in self._tensors:
            return self._moved(self._held_out[split].at(index))
        rows = torch.tensor(self._held_out_indices(split, index))
        return self._rows(split, rows.to(self._device))

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return [loss, metrics...] of one batch, each times its samples, float64."""
        batch = self.evaluation_batch(split, index)
        set_random_state(seed_for(self.seed, "evaluation", index))
        loss, values = loss_of(self._data, model, batch)
        means = torch.stack([value.double() for value in (loss.detach(), *self._checked(values))])
        return means * len(self._held_out_indices(split, index))

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the means over a split's samples of the loss and of each metric."""
        samples = self.evaluation_size(split)
        return {name: total / samples for name, total in zip(self.sums, sums, strict=True)}

    def decode_batch(self, model: nn.Module, split: Split, index: int) -> list[str]:
        """Return what decode() makes of an evaluation batch, a line for each sample.

        Raises:
            UsageError: it does not return one for each.
        """
        file = self._data.file
        batch = self.evaluation_batch(split, index)
        decoded = file.call("decode", model, batch, settings=self._data.settings)
        samples = len(self._held_out_indices(split, index))
        if isinstance(decoded, str) or not hasattr(decoded, "__len__") or len(decoded) != samples:
            raise file.wrong(
                f"decode(model, batch) must return a list with one text for each of the {samples} "
                "samples of the batch"
            )
        return [" ".join(str(text).split("\n")) for text in decoded]

    def _moved(self, batch: Any) -> Any:
        return on_device(batch, self._device, self._channels_last)

    def _rows(self, split: str, indices: Tensor) -> list[Tensor]:
        return [tensor[indices] for tensor in self._tensors[split]]

    def _fetch_training(self, place: Place) -> Any:
        epoch = self._order.epoch(place.step)
        key = Key("sample", (epoch,), self._order.indices(*place).tolist())
        return fetched(self._data, "train", key, self.seed)

    def _fetch_extra(self, place: Place) -> Any:
        key = Key("extra sample", place, self._order.extra_indices(*place).tolist())
        return fetched(self._data, "train", key, self.seed)

    def _fetch_held_out(self, split: Split, index: int) -> Any:
        key = Key("held-out sample", (), list(self._held_out_indices(split, index)))
        return fetched(self._data, split, key, self.seed)

    def _held_out_indices(self, split: Split, index: int) -> range:
        size = self.worker_batch_size
        return range(index * size, min((index + 1) * size, self.evaluation_size(split)))

    def _checked(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the metrics in the order of the first call."""
        if tuple(values) != self._names:
            raise other_metrics(self._data.file, values, self._names)
        return list(values.values())
