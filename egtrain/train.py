"""The training loop, top to bottom."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from egtrain.errors import DivergedError, InterruptedRun
from egtrain.evaluate import evaluate
from egtrain.optim.post_local import PostLocal
from egtrain.optim.randomness import seed_for
from egtrain.run import Run
from egtrain.tasks import Split
from egtrain.workers import STATISTICS


class OnItsWay:
    """A tensor that travels to the host while the device goes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the values and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._tensor.double().tolist()
        return values


class Observer(Protocol):
    """Who is told of the run: metrics, progress and checkpoints are written on one rank only."""

    def trained(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a completed update."""

    def evaluated(self, run: Run, split: Split, metrics: dict[str, float]) -> None:
        """Take the metrics of an evaluation after `run.step` updates."""

    def save(self, run: Run, state: dict[str, Any], validation: dict[str, float] | None) -> None:
        """Write a checkpoint of `run.step`; `validation` are the metrics of that step, if there was
        an evaluation.
        """


def train(
    run: Run, observer: Observer, stop_requested: Callable[[], bool]
) -> dict[str, dict[str, float]]:
    """Train from `run.step` to `run.steps` and return the final metrics of each held-out split.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights are those before that update.
        InterruptedRun: `stop_requested` said so on some rank; the run was saved after the same step
            on all.
    """
    task, workers = run.task, run.workers
    splits: list[Split] = [s for s in ("validation", "test") if task.evaluation_size(s)]
    during: Split = splits[0]
    final: dict[str, dict[str, float]] = {}
    unread: deque[tuple[int, float, OnItsWay]] = deque()
    run.model.train()

    while run.step < run.steps:
        learning_rate = run.schedule(run.step)
        statistics = take_step(run, learning_rate, stop_requested)
        unread.append((run.step, learning_rate, OnItsWay(statistics)))

        last = run.step == run.steps
        evaluation_due = last or run.step % run.evaluate_every == 0
        checkpoint_due = last or run.step % run.checkpoint_every == 0
        stop = False
        while len(unread) > (0 if evaluation_due or checkpoint_due or stop else run.unread_steps):
            stop |= report(run, observer, *unread.popleft())

        validation = None
        if evaluation_due:
            workers.average_for_evaluation()
            for split in splits if last else [during]:
                final[split] = evaluate(task, run.model, split, workers.ranks, run.precision)
                observer.evaluated(run, split, final[split])
            validation = final.get("validation")
        if checkpoint_due or stop:
            observer.save(run, run.state_dict(), validation)
        if stop and not last:
            raise InterruptedRun(f"interrupted after step {run.step}; a checkpoint was saved")
    if not final:
        workers.average_for_evaluation()
        final = {
            split: evaluate(task, run.model, split, workers.ranks, run.precision)
            for split in splits
        }
    return final


def take_step(
    run: Run, learning_rate: float, stop_requested: Callable[[], bool] = lambda: False
) -> Tensor:
    """Make one update of the weights and return what the workers reported, still on the device.

    A request to stop is asked for after the gradients, which take the time: it need not wait for a
    further step.
    """
    if run.post_local is not None and run.post_local.is_local(run.step):
        return take_local_step(run, run.post_local, learning_rate, stop_requested)
    set_learning_rate(run.optimizer, learning_rate)
    run.workers.begin_step()
    for worker in run.workers.mine:
        take_local_gradient(run, worker)
        run.workers.add_gradient(worker)
    statistics = run.workers.average_gradients(stop_requested())
    if run.clip_norm is not None:
        factor = run.workers.clip(run.clip_norm)
        if run.extrapolation is not None:
            run.extrapolation.note_clipping(factor)
    run.optimizer.step()
    run.workers.undo_unless_finite()
    run.count_update()
    return statistics


def take_local_step(
    run: Run, post_local: PostLocal, learning_rate: float, stop_requested: Callable[[], bool]
) -> Tensor:
    """Make one update of each worker's own weights, and average them where a period ends."""
    if not post_local.optimizers:
        post_local.begin()
        run.workers.begin_local_phase()
    run.workers.begin_step()
    for worker in run.workers.mine:
        run.workers.enter_own_weights(worker)
        take_local_gradient(run, worker)
        if run.clip_norm is not None:
            run.workers.clip(run.clip_norm)
        set_learning_rate(post_local.optimizers[worker], learning_rate)
        post_local.optimizers[worker].step()
        run.workers.keep_own_weights(worker)
    statistics = run.workers.report_only(stop_requested())
    run.count_update()
    if post_local.averages_after(run.step):
        run.workers.average_own_weights()
    return statistics


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def take_local_gradient(run: Run, worker: int) -> None:
    """Take one worker's gradient, at its extrapolated weights where the step has extrapolation."""
    task, workers, extrapolation = run.task, run.workers, run.extrapolation
    batch = task.batch(worker, run.step)

    def backward(samples: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed_for(run.seed, "dropout", worker, run.step))
        with torch.autocast(
            workers.ranks.device.type, torch.bfloat16, enabled=run.precision == "bf16"
        ):
            loss, metric = task.loss(run.forward, samples)
        torch.autograd.backward(loss)
        return loss.detach(), metric

    def second_gradient() -> None:
        backward(task.extra_batch(worker, run.step) if run.new_samples else batch)
        workers.restore_buffers(worker)

    workers.enter(worker)
    relative_size = None
    if extrapolation is not None and run.step in run.extrapolated_steps:
        with extrapolation.shifted(worker, gradient=second_gradient):
            if worker == 0:
                relative_size = workers.relative_shift()
            loss, metric = backward(batch)
    else:
        loss, metric = backward(batch)
    workers.note(worker, loss, metric, relative_size)


def report(
    run: Run, observer: Observer, step: int, learning_rate: float, statistics: OnItsWay
) -> bool:
    """Read a step's statistics on the host, pass them on, and return whether a rank was asked to
    stop.

    Raises:
        DivergedError: a worker's loss or the mean gradient was not finite.
    """
    *entries, squared_norm_of_mean = statistics.read()
    rows = [entries[k : k + len(STATISTICS)] for k in range(0, len(entries), len(STATISTICS))]
    losses, metrics, squared_norms, relative_sizes, alignments, stops = zip(*rows, strict=True)
    for worker, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of worker {worker} became {loss} at step {step}: lower optimizer.lr or "
                "lengthen the warm-up"
            )
    squared = {f" of worker {k}": norm for k, norm in enumerate(squared_norms)} | {
        "": squared_norm_of_mean
    }
    for whose, norm in squared.items():
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient{whose} became {norm} at step {step}: lower optimizer.lr"
            )
    mean_squared_norm = sum(squared_norms) / len(squared_norms)
    values = {
        "loss": sum(losses) / len(losses),
        run.task.training_metric.name: sum(metrics) / len(metrics),
        "learning_rate": learning_rate,
        "local_gradient_norm": mean_squared_norm**0.5,
        "gradient_alignment": alignments[0],
    }
    if run.post_local is None or not run.post_local.is_local(step - 1):
        values["gradient_norm"] = squared_norm_of_mean**0.5
        run.noise_scale.update(
            mean_squared_norm, squared_norm_of_mean, len(rows), run.task.worker_batch_size
        )
    if run.post_local is not None:
        values["synchronisations"] = run.synchronisations(step)
    if run.extrapolation is not None:
        values["extrapolation_size"] = relative_sizes[0]
    if run.noise_scale.value is not None:
        values["noise_scale"] = run.noise_scale.value
    observer.trained(run, step, values)
    return any(stop > 0 for stop in stops)
