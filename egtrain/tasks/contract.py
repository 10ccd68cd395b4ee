"""What a task file must keep to: what its functions return, and how that is checked.

It is tried out before a run, so that a mistake is reported before anything is trained.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from egtrain.data.user import UserData
from egtrain.errors import UsageError
from egtrain.nested import tensors_in
from egtrain.task_file import TaskFile
from egtrain.tasks import LOSS, Metric
from egtrain.tasks.loading import Key, fetched, on_device, require_sendable

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
_RETURNED: WeakSet[nn.Module] = WeakSet()
"""The parts with weights of every model that a task file has returned."""


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
        if not isinstance(name, str) or not name.strip() or tensor is None:
            raise file.wrong(
                f"the metric {name!r} of loss(model, batch) must be one number under a name: the "
                f"mean over the batch; it is {_described(value)}"
            )
        if not name.isprintable():
            raise file.wrong(
                f"the metric {name!r} of loss(model, batch) has a name that cannot be printed: "
                "use letters"
            )
        values[name] = tensor.reshape(()).float()
    return loss.reshape(()), values


def try_out(
    data: UserData,
    make_model: Callable[[], nn.Module],
    *,
    seed: int,
    worker_batch_size: int,
    loaders: int,
    precision: str,
    device: torch.device,
) -> None:
    """Try a task file out, on a model that is thrown away, and note which metrics it returns.

    The first samples of the training and of the test set go through `loss` once, as in training and
    in evaluation, so that a mistake is reported before anything is trained. The gradient is taken
    too.

    Args:
        data: the data sets.
        make_model: returns a model on the device.
        seed: the run's.
        worker_batch_size: b.
        loaders: processes that will fetch samples.
        precision: fp32 or bf16.
        device: where the batches go.

    Raises:
        TaskFileError: the task file's code raised an exception.
        UsageError: it returned something wrong, or changed what it was given.
    """
    file = data.file
    _require_repeatable(data, seed)
    model = make_model()
    for split in ("train", "test"):
        indices = list(range(min(worker_batch_size, data.size(split))))
        batch = fetched(data, split, Key("tried sample", (), indices), seed)
        if loaders:
            require_sendable(data, batch)
        training = split == "train"
        model.train(training)
        with (
            torch.inference_mode(not training),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            loss, values = _tried(data, model, on_device(batch, device, channels_last=False))
        if clash := RESERVED.intersection(values):
            raise file.wrong(
                f"the metric '{min(clash)}' of loss(model, batch) has a name that egtrain uses: "
                "rename it"
            )
        if training:
            data.metrics = tuple(values)
            _require_gradient(file, model, loss)
        elif tuple(values) != data.metrics:
            raise other_metrics(file, values, data.metrics or ())
    metric_of(file, tuple(values))


def _tried(data: UserData, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a task file's loss returns.

    Raises:
        UsageError: it changes the batch or the model, of which both are used again, for example for
            a second gradient, or switches gradients off.
    """

    def versions() -> list[tuple[int, int]]:
        """Return which tensors the batch has, and how often each was changed."""
        return [(id(t), 0 if t.is_inference() else t._version) for t in tensors_in(batch)]

    parameters = dict(model.named_parameters())
    weights = {name: (p.detach().clone(), p.requires_grad) for name, p in parameters.items()}
    batch_before, enabled = versions(), torch.is_grad_enabled()
    result = loss_of(data, model, batch)
    if torch.is_grad_enabled() != enabled:
        torch.set_grad_enabled(enabled)
        raise data.file.wrong(
            "loss(model, batch) switches gradients on or off and leaves it so: write it as a "
            "block, with torch.no_grad()"
        )
    if versions() != batch_before:
        raise data.file.wrong(
            "loss(model, batch) changes its batch, which is used again: make new tensors "
            "(x = x * 2 instead of x *= 2), and take from a dict without pop()"
        )
    for name, (weight, required) in weights.items():
        now = parameters[name]
        if now.requires_grad != required or not torch.equal(
            torch.nan_to_num(now.detach()), torch.nan_to_num(weight)
        ):
            raise data.file.wrong(
                f"loss(model, batch) changes the parameter '{name}' of the model: only the "
                "optimizer may; what else shall change is a buffer, and what is frozen, freeze in "
                "model()"
            )
        if now.grad is not None:
            raise data.file.wrong(
                "loss(model, batch) calls backward() itself: leave it out and return the loss"
            )
    return result


def _require_gradient(file: TaskFile, model: nn.Module, loss: Tensor) -> None:
    """Take the gradient of a loss once.

    Raises:
        TaskFileError: that fails.
        UsageError: the loss depends on no weight, or a gradient is sparse.
    """
    if not loss.requires_grad:
        raise without_graph(file)
    with file.running("the gradient of loss(model, batch)"):
        torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise without_graph(file)
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise file.wrong(
                f"the gradient of the parameter '{name}' is sparse: leave sparse=True out"
            )
    model.zero_grad()


def user_model(file: TaskFile, settings: Mapping[str, Any]) -> nn.Module:
    """Return what model() of a task file returns.

    Raises:
        TaskFileError: it raised an exception.
        UsageError: it is no module that can be trained.
    """
    model = file.call("model", settings=settings)
    if not isinstance(model, nn.Module):
        raise file.wrong(f"model() must return a torch.nn.Module, not {_described(model)}")
    _require_new(file, model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer) for t in tensors):
        raise file.wrong("model() has lazy layers: give the sizes of their inputs")
    if any(t.is_meta for t in tensors):
        raise file.wrong("model() has weights without values, on the device 'meta': give them some")
    if any(t.is_inference() for t in tensors):
        raise file.wrong("model() must not make its weights under torch.inference_mode()")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise file.wrong(
            "model() has no parameter that requires a gradient: nothing can be trained"
        )
    kinds = {str(p.dtype).removeprefix("torch.") for p in parameters.values()}
    if len(kinds) > 1:
        raise file.wrong(
            f"the trained parameters of model() have the types {', '.join(sorted(kinds))}: give "
            "all of them one, such as float32"
        )
    if any(p.is_complex() for p in parameters.values()):
        raise file.wrong(
            "the trained parameters of model() are complex: keep real and imaginary parts as "
            "float32, and use torch.view_as_complex in forward()"
        )
    _require_memory_of_their_own(file, parameters)
    return model


def _require_new(file: TaskFile, model: nn.Module) -> None:
    """Refuse a model of which a part was in one before: training one would change the other."""
    parts = [
        part
        for part in model.modules()
        if any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False)))
    ]
    if any(part in _RETURNED for part in parts):
        raise file.wrong(
            "model() must return a new model each time, and a part of this one was in another: "
            "make all of its parts within model(), or a copy.deepcopy() of them"
        )
    _RETURNED.update(parts)


def _require_memory_of_their_own(file: TaskFile, parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters whose elements are the same numbers in memory, but for tied ones."""
    owners: dict[int, str] = {}
    for name, parameter in parameters.items():
        if any(s == 0 and n > 1 for s, n in zip(parameter.stride(), parameter.shape, strict=True)):
            raise file.wrong(
                f"the parameter '{name}' of model() is an expanded tensor: make it a tensor of its "
                "own with clone()"
            )
        owner = owners.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if owner != name:
            raise file.wrong(
                f"the parameters '{owner}' and '{name}' of model() share memory: clone() one of "
                "them, or tie them by using one nn.Parameter for both"
            )


def without_graph(file: TaskFile) -> UsageError:
    """Return the error of a loss that no weight can learn from."""
    return file.wrong(
        "the loss of loss(model, batch) depends on no weight of the model: do not detach it, and "
        "do not compute it under torch.no_grad()"
    )


def other_metrics(file: TaskFile, values: Any, before: tuple[str, ...]) -> UsageError:
    """Return the error of a loss that returns other metrics than before."""
    return file.wrong(
        f"loss(model, batch) returned the metrics {listed(values)}, and before "
        f"{listed(before)}: return the same ones every time, in training and in evaluation"
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
        if higher:
            raise file.wrong(
                "higher_is_better = True is about the loss, which is made small: leave it out, or "
                "name the metric that it is about, such as metric = 'accuracy'"
            )
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
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and (value.dtype == bool or np.isrealobj(value))
    return isinstance(value, int | float)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def listed(names: Iterable[str]) -> str:
    """Return names for a message."""
    return ", ".join(map(str, names)) or "(none)"
