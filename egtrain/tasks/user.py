"""The task of a task file: its data, its loss and its metrics, in batches of a run."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from egtrain.data.user import UserData
from egtrain.errors import UsageError
from egtrain.nested import tensors_in
from egtrain.optim.randomness import seed_for
from egtrain.task_file import TaskFile
from egtrain.tasks import LOSS, Metric, Split
from egtrain.tasks.loading import Batches, Key, fetched, on_device, set_random_state
from egtrain.tasks.order import Order

FROZEN_SEED = 0
"""Compared runs of all seeds see the same samples, augmented in the same way."""
KNOWN_DIRECTIONS = {"accuracy": True}
"""Whether higher is better of metrics whose direction a task file need not say."""

RESERVED = frozenset(
    {
        *("step", "epoch", "split", "wall", "loss", "learning_rate", "gradient_norm"),
        *("local_gradient_norm", "gradient_alignment", "extrapolation_size", "noise_scale"),
        "synchronisations",
    }
)
"""What a line of metrics.jsonl holds besides the metrics."""


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
            raise self._data.file.wrong(
                f"loss(model, batch) returned the metrics {_listed(values)}, and before "
                f"{_listed(self._names)}: return the same ones every time"
            )
        return list(values.values())


def loss_of(data: UserData, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss and the metrics of a task file's loss, all of them scalars.

    Raises:
        TaskFileError: it raised an exception.
        UsageError: it returned something else.
    """
    file, training = data.file, model.training
    result = file.call("loss", model, batch, settings=data.settings)
    if model.training != training:
        raise file.wrong(
            "loss(model, batch) leaves the model in another mode than it found: undo its "
            "model.train() or model.eval() before it returns"
        )
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise file.wrong(
            "loss(model, batch) must return the mean loss and a dict of metrics, such as "
            f"(loss, {{'accuracy': accuracy}}), and returned {_described(result)}"
        )
    loss, metrics = result
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
        raise file.wrong(
            "the loss of loss(model, batch) must be one floating-point number, as a tensor: the "
            f"mean over the batch; it is {_described(loss)}"
        )
    values: dict[str, Tensor] = {}
    for name, value in metrics.items():
        tensor = torch.as_tensor(value, device=loss.device).detach() if _is_number(value) else None
        if not isinstance(name, str) or tensor is None:
            raise file.wrong(
                f"the metric {name!r} of loss(model, batch) must be one number under a name: the "
                f"mean over the batch; it is {_described(value)}"
            )
        values[name] = tensor.reshape(()).float()
    return loss.reshape(()), values


def try_out(
    data: UserData,
    make_model: Callable[[], nn.Module],
    *,
    seed: int,
    worker_batch_size: int,
    device: torch.device,
) -> None:
    """Try a task file out, on a model that is thrown away, and note which metrics it returns.

    The first samples of the training and of the test set go through `loss` once, so that a mistake
    is reported before anything is trained.

    Args:
        data: the data sets.
        make_model: returns a model on the device.
        seed: the run's.
        worker_batch_size: b.
        device: where the batches go.

    Raises:
        TaskFileError: the task file's code raised an exception.
        UsageError: it returned something wrong.
    """
    file = data.file
    _require_repeatable(data, seed)
    model = make_model()
    for split in ("train", "test"):
        indices = list(range(min(worker_batch_size, data.size(split))))
        batch = fetched(data, split, Key("tried sample", (), indices), seed)
        model.train(split == "train")
        loss, values = loss_of(data, model, on_device(batch, device, channels_last=False))
        if split == "train":
            if not loss.requires_grad:
                raise without_graph(file)
            data.metrics = tuple(values)
    if clash := RESERVED.intersection(values):
        raise file.wrong(
            f"the metric '{min(clash)}' of loss(model, batch) has a name that egtrain uses: rename "
            "it"
        )
    metric_of(file, tuple(values))


def user_model(file: TaskFile, settings: Mapping[str, Any]) -> nn.Module:
    """Return what model() of a task file returns.

    Raises:
        TaskFileError: it raised an exception.
        UsageError: it is no module that can be trained.
    """
    model = file.call("model", settings=settings)
    if not isinstance(model, nn.Module):
        raise file.wrong(f"model() must return a torch.nn.Module, not {_described(model)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(isinstance(p, nn.UninitializedParameter) for p in parameters):
        raise file.wrong("model() has lazy layers: give the sizes of their inputs")
    if not parameters:
        raise file.wrong(
            "model() has no parameter that requires a gradient: nothing can be trained"
        )
    kinds = {str(p.dtype).removeprefix("torch.") for p in parameters}
    if len(kinds) > 1:
        raise file.wrong(
            f"the trained parameters of model() have the types {', '.join(sorted(kinds))}: give "
            "all of them one, such as float32"
        )
    return model


def without_graph(file: TaskFile) -> UsageError:
    """Return the error of a loss that no weight can learn from."""
    return file.wrong(
        "the loss of loss(model, batch) depends on no weight of the model: do not detach it, and "
        "do not compute it under torch.no_grad()"
    )


def metric_of(file: TaskFile, names: tuple[str, ...]) -> Metric:
    """Return the metric that counts: the one that the file names, or the first, or the loss."""
    name = getattr(file.module, "metric", names[0] if names else LOSS.name)
    higher = getattr(file.module, "higher_is_better", None)
    if name not in (*names, LOSS.name):
        raise file.wrong(
            f"metric = {name!r} is none of those that loss(model, batch) returns: "
            f"{_listed((*names, LOSS.name))}"
        )
    if name == LOSS.name:
        return LOSS
    if higher is None:
        higher = KNOWN_DIRECTIONS.get(name)
    if not isinstance(higher, bool):
        raise file.wrong(
            f"say whether more '{name}' is better: add the line higher_is_better = True, or False"
        )
    return Metric(name, "", higher_is_better=higher)


def _require_repeatable(data: UserData, seed: int) -> None:
    """Refuse a data set whose samples depend on more than the random state that it is given."""
    if data.tensors("train") is not None:
        return
    key = Key("tried sample", (), [0, data.size("train") - 1])
    once, again = (list(tensors_in(fetched(data, "train", key, seed))) for _ in range(2))
    if len(once) != len(again) or not all(map(_are_equal, once, again)):
        raise data.file.wrong(
            "dataset('train') returns another sample when it is asked for the same one again, "
            "though the random state is the same: draw with random, numpy.random or torch in "
            "__getitem__, not with a generator that the data set keeps"
        )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, where not-a-number equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    return bool((same | ((one != one) & (other != other))).all())


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float | np.number)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "(none)"
