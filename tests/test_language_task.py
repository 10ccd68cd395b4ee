"""Each worker reads its own columns and carries its own state along; evaluation predicts every word
once.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from egtrain.data.text import EOS, TextData
from egtrain.errors import UsageError
from egtrain.evaluate import evaluate
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.tasks import Split
from egtrain.tasks.language import LanguageTask
from egtrain.workers import Ranks, Workers

WORDS, BPTT, WORKERS, SHARE = 11, 5, 2, 3
CPU = torch.device("cpu")


def text(train: int = 200, validation: int = 57, test: int = 83) -> TextData:
    generator = torch.Generator().manual_seed(3)
    streams = [
        torch.randint(WORDS, (length,), generator=generator) for length in (train, validation, test)
    ]
    return TextData(*streams, vocabulary=tuple(map(str, range(WORDS))), floor=None, digest="")


def task_on(data: TextData, **changes: Any) -> LanguageTask:
    options: dict[str, Any] = {
        "workers": WORKERS,
        "worker_batch_size": SHARE,
        "seed": 5,
        "bptt": BPTT,
    }
    return LanguageTask(data, device=CPU, **(options | changes))


def model_for(task: LanguageTask, dropout: float = 0.0, layers: int = 2) -> LSTMLanguageModel:
    torch.manual_seed(1)
    shape = {"width": 6, "layers": layers, "dropout": dropout, "columns": task.worker_batch_size}
    return LSTMLanguageModel(WORDS, **shape).double()  # type: ignore[arg-type]


def test_columns_lie_side_by_side_and_windows_follow_each_other() -> None:
    data = text()
    task = task_on(data)
    length = (200 - 1) // (WORKERS * SHARE)
    assert task.steps_per_epoch == length // BPTT == 6
    for worker in range(WORKERS):
        for step in range(2 * task.steps_per_epoch):
            window = task.batch(worker, step)
            assert window.carried is not None
            assert bool(window.carried) == (step % task.steps_per_epoch > 0)
            for column in range(SHARE):
                start = (worker * SHARE + column) * length + step % task.steps_per_epoch * BPTT
                assert window.words[:, column].tolist() == data.train[start : start + BPTT].tolist()
                assert (
                    window.targets[:, column].tolist()
                    == data.train[start + 1 : start + BPTT + 1].tolist()
                )


def test_a_second_batch_is_a_function_of_worker_and_step_and_starts_from_nothing() -> None:
    task = task_on(text())
    state = torch.get_rng_state()
    one, again, other = (
        task.extra_batch(1, 4),
        task_on(text()).extra_batch(1, 4),
        task.extra_batch(0, 4),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.words, again.words)
    assert not torch.equal(one.words, other.words)
    assert one.carried is None
    assert torch.equal(one.words[1:], one.targets[:-1])


def test_windows_with_a_carried_state_are_one_long_sequence() -> None:
    """Until the epoch ends: then the state is zero again."""
    task = task_on(text())
    model = model_for(task)
    windows = [task.batch(0, step) for step in range(task.steps_per_epoch)]
    losses = [task.loss(model, window)[0] for window in windows]
    logits, _ = model(torch.cat([window.words for window in windows]), None)
    whole = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        torch.cat([window.targets for window in windows]).flatten(),
        reduction="none",
    ).view(task.steps_per_epoch, -1)
    assert torch.allclose(torch.stack(losses), whole.mean(dim=1).float(), rtol=1e-6)
    assert torch.equal(task.loss(model, task.batch(0, task.steps_per_epoch))[0], losses[0])


def test_gradients_stop_at_the_beginning_of_a_window_and_reach_all_of_it() -> None:
    task = task_on(text())
    model = model_for(task)
    for step in range(3):
        model.zero_grad()
        task.loss(model, task.batch(0, step))[0].backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert not model.hidden.requires_grad


def test_a_worker_has_its_own_state_and_a_second_gradient_leaves_it_alone() -> None:
    task = task_on(text())
    model = model_for(task)
    workers = Workers(model, WORKERS, Ranks())
    states: dict[int, list[Tensor]] = {0: [], 1: []}
    for step in range(3):
        workers.begin_step()
        for worker in range(WORKERS):
            workers.enter(worker)
            task.loss(model, task.extra_batch(worker, step))
            task.loss(model, task.batch(worker, step))
            workers.restore_buffers(worker)
            loss, metric = task.loss(model, task.batch(worker, step))
            workers.report(worker, loss.detach(), metric, None)
            states[worker].append(model.hidden.clone())
    for worker in range(WORKERS):
        alone = model_for(task)
        for step in range(3):
            task.loss(alone, task.batch(worker, step))
            assert torch.allclose(alone.hidden, states[worker][step], rtol=1e-12)
    assert not torch.equal(states[0][-1], states[1][-1])


@torch.no_grad()
def naive_perplexity(model: LSTMLanguageModel, words: Tensor, columns: int) -> float:
    """One word at a time, one column after the other."""
    length = -(-len(words) // columns)
    nats = 0.0
    model.eval()
    for start in range(0, len(words), length):
        state, before = None, EOS if start == 0 else int(words[start - 1])
        for word in words[start : start + length].tolist():
            logits, state = model(torch.tensor([[before]]), state)
            nats -= float(logits[0, 0].log_softmax(0)[word])
            before = word
    return math.exp(nats / len(words))


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_evaluation_predicts_every_word_once_and_carries_no_state_in_or_out(
    split: Split, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egtrain.tasks.language.EVALUATION_COLUMNS", 7)
    monkeypatch.setattr("egtrain.tasks.language.EVALUATION_WINDOW", 4)
    task = task_on(text())
    model = model_for(task, dropout)
    model.hidden.normal_()
    before = model.hidden.clone()
    found = evaluate(task, model, split, Ranks())
    assert torch.equal(model.hidden, before)
    words = text().validation if split == "validation" else text().test
    assert math.isclose(found["perplexity"], naive_perplexity(model, words, 7), rel_tol=1e-5)
    assert math.isclose(found["perplexity"], math.exp(found["loss"]), rel_tol=1e-12)


def test_a_text_of_a_few_words_can_be_evaluated() -> None:
    task = task_on(text(validation=3, test=1))
    for split, count in (("validation", 3), ("test", 1)):
        assert task.evaluation_size(split) == count  # type: ignore[arg-type]
        assert evaluate(task, model_for(task), split, Ranks())["perplexity"] > 1  # type: ignore[arg-type]


def test_frozen_windows_are_those_of_the_text_whatever_the_batch() -> None:
    data = text()
    batches = task_on(data).frozen_batches(torch.tensor([0, 7, 3]))
    assert [size for _, size in batches] == [3]
    assert batches[0][0].words.T.tolist() == [
        data.train[i * BPTT : (i + 1) * BPTT].tolist() for i in (0, 7, 3)
    ]


@pytest.mark.parametrize("words", [BPTT * 10 - 1, BPTT * 10, BPTT * 10 + 1])
def test_every_sample_is_a_window_with_a_word_after_it(words: int) -> None:
    data = text(train=words)
    task = task_on(data, workers=1, worker_batch_size=1)
    assert task.samples == (10 if words > BPTT * 10 else 9)
    ((window, _),) = task.frozen_batches(torch.tensor([task.samples - 1]))
    last = task.samples * BPTT
    assert window.targets[:, 0].tolist() == data.train[last - BPTT + 1 : last + 1].tolist()


def test_sharpness_differentiates_it_twice() -> None:
    task = task_on(text())
    model = model_for(task).float()
    with FrozenLoss(model, task.loss, task.frozen_batches(torch.arange(8))) as loss:
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator) for p in loss.parameters]
        product = loss.hessian_product(direction)
        base = loss.gradient()
        step = 1e-3
        with loss.at([p + step * v for p, v in zip(loss.parameters, direction, strict=True)]):
            ahead = loss.gradient()
        with loss.at([p - step * v for p, v in zip(loss.parameters, direction, strict=True)]):
            behind = loss.gradient()
    for exact, high, low, gradient in zip(product, ahead, behind, base, strict=True):
        assert torch.allclose(
            exact, (high - low) / (2 * step), atol=3e-3 * float(gradient.abs().max()) + 1e-4
        )


def test_columns_shorter_than_a_window_are_refused() -> None:
    with pytest.raises(
        UsageError,
        match=r"a batch of 20 x 3 = 60 columns leaves 3 of the 200 training words to each",
    ):
        task_on(text(), workers=20)


def test_the_reference_model_has_its_published_size() -> None:
    model = LSTMLanguageModel(33_278, width=650, layers=3, dropout=0.4, columns=1)
    assert sum(p.numel() for p in model.parameters()) == 31_819_578


def test_weights_in_flat_storage_give_the_same_values_where_they_change_in_place() -> None:
    """Kernels must not keep copies of weights: extrapolation moves them between two passes."""
    task = task_on(text())
    model, other = model_for(task).float(), model_for(task).float()
    workers = Workers(model, WORKERS, Ranks())
    window = task.batch(0, 0)
    assert torch.equal(task.loss(model, window)[0], task.loss(other, window)[0])
    workers.parameters.add_(0.01)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    assert torch.equal(task.loss(model, window)[0], task.loss(other, window)[0])


def test_autocast_gives_nearly_the_same_loss_and_keeps_the_state_in_full_precision() -> None:
    task = task_on(text())
    model = model_for(task).float()
    plain = task.loss(model, task.batch(0, 0))[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(model, task.batch(0, 0))
        logits, state = model(task.batch(0, 0).words)
    loss.backward()
    assert math.isclose(loss.item(), plain, rel_tol=1e-2)
    assert (logits.dtype, state.dtype, model.hidden.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_the_lowest_perplexity_of_the_data_is_the_best_that_is_possible() -> None:
    assert task_on(text()).best_possible is None
    assert task_on(replace(text(), floor=8.6)).best_possible == 8.6
