"""What a task file must keep to: what its functions return, and how that is checked.

It is tried out before a run, so that a mistake is reported before anything is trained.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from egtrain.data.user import UserData
from egtrain.errors import UsageError
from egtrain.nested import tensors_in
from egtrain.task_file import TaskFile
from egtrain.tasks import LOSS, Metric
from egtrain.tasks.loading import Key, fetched, on_device

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
            f"{listed((*names, LOSS.name))}"
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


def listed(names: Iterable[str]) -> str:
    """Return names for a message."""
    return ", ".join(map(str, names)) or "(none)"
