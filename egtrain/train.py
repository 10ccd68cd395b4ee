"""The training loop, top to bottom."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from egtrain.errors import InterruptedRun
from egtrain.evaluate import evaluate
from egtrain.optim.post_local import PostLocal
from egtrain.optim.randomness import seed_for
from egtrain.run import Run
from egtrain.statistics import HostCopy, read_reported, require_finite
from egtrain.tasks import Split


class Observer(Protocol):
    """Receives the news of a run; only one rank writes metrics, progress and checkpoints."""

    def trained(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a completed update."""

    def evaluating(self, split: Split, done: int, total: int) -> None:
        """Take the number of evaluated batches of a split."""

    def evaluated(self, run: Run, split: Split, metrics: dict[str, float]) -> None:
        """Take the metrics of an evaluation after `run.step` updates."""

    def save(self, run: Run, state: dict[str, Any], validation: dict[str, float] | None) -> None:
        """Write a checkpoint of `run.step`, with that step's metrics if it was evaluated."""


def train(
    run: Run, observer: Observer, stop_requested: Callable[[], bool]
) -> dict[Split, dict[str, float]]:
    """Train from `run.step` to `run.steps` and return the final metrics of each held-out split.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights are those before that update.
        InterruptedRun: `stop_requested` was true on some rank; all saved after the same step.
    """
    splits: list[Split] = [s for s in ("validation", "test") if run.task.evaluation_size(s)]
    final: dict[Split, dict[str, float]] = {}
    unread: deque[tuple[int, float, HostCopy]] = deque()
    run.model.train()

    while run.step < run.steps:
        learning_rate = run.schedule(run.step)
        statistics = take_step(run, learning_rate, stop_requested)
        unread.append((run.step, learning_rate, HostCopy(statistics)))

        last = run.step == run.steps
        evaluation_due = last or run.step % run.evaluate_every == 0
        checkpoint_due = last or run.step % run.checkpoint_every == 0
        stop = False
        while len(unread) > (0 if evaluation_due or checkpoint_due or stop else run.unread_steps):
            stop |= report(run, observer, *unread.popleft())

        validation = None
        if evaluation_due:
            final = evaluate_splits(run, observer, splits if last else splits[:1])
            for split, metrics in final.items():
                observer.evaluated(run, split, metrics)
            validation = final.get("validation")
        if checkpoint_due or stop:
            observer.save(run, run.state_dict(), validation)
        if stop and not last:
            raise InterruptedRun(f"interrupted after step {run.step}; a checkpoint was saved")
    return final or evaluate_splits(run, observer, splits)


def evaluate_splits(
    run: Run, observer: Observer, splits: list[Split]
) -> dict[Split, dict[str, float]]:
    """Return the metrics of each split, evaluated at the mean of the workers."""
    run.workers.average_for_evaluation()
    final, ranks = {}, run.workers.ranks
    for split in splits:
        progress = partial(observer.evaluating, split)
        final[split] = evaluate(run.task, run.model, split, ranks, run.precision, progress)
    return final


def take_step(
    run: Run, learning_rate: float, stop_requested: Callable[[], bool] = lambda: False
) -> Tensor:
    """Make one update of the weights and return what the workers reported, still on the device.

    The stop request is read after the gradients, which take most of the time, so that it need not
    wait for another step.
    """
    if run.post_local is not None and run.post_local.is_local(run.step):
        return take_local_step(run, run.post_local, learning_rate, stop_requested)
    run.set_learning_rate(run.optimizer, learning_rate)
    run.workers.begin_step()
    for worker in run.workers.carried:
        take_local_gradient(run, worker)
        run.workers.add_gradient(worker)
    statistics = run.workers.average_gradients(stop_requested())
    if run.extrapolation is not None:
        run.extrapolation.averaged(run.workers.gradient_norm)
    if run.clip_norm is not None:
        run.workers.clip(run.clip_norm)
    run.optimizer.step()
    run.workers.undo_unless_finite()
    run.count_update()
    return statistics


def take_local_step(
    run: Run, post_local: PostLocal, learning_rate: float, stop_requested: Callable[[], bool]
) -> Tensor:
    """Make one update of each worker's weights; average them at the end of a period."""
    if not post_local.optimizers:
        post_local.begin()
        run.workers.begin_local_phase()
    run.workers.begin_step()
    for worker in run.workers.carried:
        run.workers.enter_local_weights(worker)
        take_local_gradient(run, worker)
        if run.clip_norm is not None:
            run.workers.clip(run.clip_norm)
        run.set_learning_rate(post_local.optimizers[worker], learning_rate)
        post_local.optimizers[worker].step()
        run.workers.keep_local_weights(worker)
    statistics = run.workers.report_only(stop_requested())
    run.count_update()
    if post_local.averages_after(run.step):
        run.workers.average_local_weights()
    return statistics


def take_local_gradient(run: Run, worker: int) -> None:
    """Take one worker's gradient, at extrapolated weights if the step has extrapolation."""
    task, workers, extrapolation = run.task, run.workers, run.extrapolation
    device = workers.ranks.device.type
    batch = task.batch(worker, run.step)

    def backward(samples: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed_for(run.seed, "dropout", worker, run.step))
        with torch.autocast(device, torch.bfloat16, enabled=run.precision == "bf16"):
            loss, metric = task.loss(run.forward, samples)
        torch.autograd.backward(loss)
        return loss.detach(), metric

    def second_gradient() -> None:
        backward(task.extra_batch(worker, run.step) if run.new_samples else batch)
        workers.restore_buffers(worker)

    workers.enter(worker)
    relative_shift = None
    if extrapolation is not None and run.step in run.extrapolated_steps:
        with extrapolation.shifted(worker, gradient=second_gradient):
            if worker == 0:
                relative_shift = workers.relative_shift()
            loss, metric = backward(batch)
    else:
        loss, metric = backward(batch)
    workers.report(worker, loss, metric, relative_shift)


def report(
    run: Run, observer: Observer, step: int, learning_rate: float, statistics: HostCopy
) -> bool:
    """Read a step's statistics, pass them on, and return whether a rank was asked to stop.

    Raises:
        DivergedError: a worker's loss or the mean gradient was not finite.
    """
    reported, squared_norm_of_mean = read_reported(statistics.read())
    require_finite(reported, squared_norm_of_mean, step)
    workers = run.workers.count
    mean_squared_norm = sum(reported.squared_gradient_norm) / workers
    values = {
        "loss": sum(reported.loss) / workers,
        run.task.training_metric.name: sum(reported.metric) / workers,
        "learning_rate": learning_rate,
        "local_gradient_norm": mean_squared_norm**0.5,
        "gradient_alignment": reported.gradient_alignment[0],
    }
    if run.post_local is None or not run.post_local.is_local(step - 1):
        values["gradient_norm"] = squared_norm_of_mean**0.5
        run.noise_scale.update(
            mean_squared_norm, squared_norm_of_mean, workers, run.task.worker_batch_size
        )
    if run.post_local is not None:
        values["synchronisations"] = run.synchronisations(step)
    if run.extrapolation is not None:
        values["extrapolation_size"] = reported.relative_shift[0]
    if run.noise_scale.value is not None:
        values["noise_scale"] = run.noise_scale.value
    observer.trained(run, step, values)
    return any(stop > 0 for stop in reported.stop)
