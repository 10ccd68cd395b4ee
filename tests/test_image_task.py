"""Every batch is a function of seed, worker and step; and evaluation is one of the model alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from egtrain.data.images import ImageData, load_images
from egtrain.errors import UsageError
from egtrain.evaluate import evaluate
from egtrain.models.resnet import ResNet
from egtrain.tasks import image as image_task
from egtrain.tasks.image import ImageTask
from egtrain.workers import Ranks

SAMPLES, WORKERS, SHARE = 75, 4, 4
STEPS_PER_EPOCH = 4  # 4 x 16 = 64, and 11 are dropped


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Return images whose every pixel is the number of the image, so that they can be told
    apart.
    """

    def numbered(first: int, count: int) -> Tensor:
        numbers = torch.arange(first, first + count, dtype=torch.uint8)
        return numbers[:, None, None, None].expand(count, 8, 8, 3).contiguous()

    return ImageData(
        x_train=numbered(100, SAMPLES),
        y_train=torch.arange(SAMPLES) % 3,
        x_validation=numbered(0, 10),
        y_validation=torch.arange(10) % 3,
        x_test=numbered(20, 33),
        y_test=torch.arange(33) % 3,
        classes=3,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        ceiling=None,
        digest="",
    )


def task_on(data: ImageData, **changes: Any) -> ImageTask:
    options: dict[str, Any] = {
        "workers": WORKERS,
        "worker_batch_size": SHARE,
        "seed": 5,
        "augment": False,
    }
    return ImageTask(data, channels_last=True, device=torch.device("cpu"), **(options | changes))


def numbers_of(batch: tuple[Tensor, Tensor]) -> list[int]:
    """Return which images a batch holds."""
    images, labels = batch
    numbers = images.amax(dim=(1, 2, 3)).round().int() - 100
    assert torch.equal(labels, numbers.long() % 3)
    return numbers.tolist()


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_is_a_function_of_worker_and_step(data: ImageData, augment: bool) -> None:
    """In whatever order they are asked for, by whomever: that is what makes ranks and resumed runs
    equal.
    """
    places = [(worker, step) for step in range(10) for worker in range(WORKERS)]
    task = task_on(data, augment=augment)
    forwards = {place: task.batch(*place) for place in places}
    other = task_on(data, augment=augment)
    torch.manual_seed(99)
    backwards = {place: other.batch(*place) for place in reversed(places)}
    for place in places:
        for one, two in zip(forwards[place], backwards[place], strict=True):
            assert torch.equal(one, two)


def test_batches_leave_the_global_random_stream_alone(data: ImageData) -> None:
    task = task_on(data, augment=True)
    before = torch.get_rng_state()
    task.batch(1, 3)
    task.extra_batch(1, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_takes_each_sample_once_at_most_and_drops_the_rest(data: ImageData) -> None:
    task = task_on(data)
    assert task.steps_per_epoch == STEPS_PER_EPOCH
    epochs = []
    for epoch in range(6):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        taken = [
            number
            for step in steps
            for worker in range(WORKERS)
            for number in numbers_of(task.batch(worker, step))
        ]
        assert len(taken) == len(set(taken)) == STEPS_PER_EPOCH * WORKERS * SHARE
        epochs.append(taken)
    assert len({tuple(taken) for taken in epochs}) == 6
    # Others are dropped each time: in the long run every sample has its turn.
    assert set().union(*epochs) == set(range(SAMPLES))


def test_a_batch_is_cut_in_the_order_of_the_workers(data: ImageData) -> None:
    """K workers of b samples see together what one worker of K x b samples sees."""
    together = task_on(data, workers=1, worker_batch_size=WORKERS * SHARE)
    task = task_on(data)
    for step in range(9):
        parts = [
            number for worker in range(WORKERS) for number in numbers_of(task.batch(worker, step))
        ]
        assert parts == numbers_of(together.batch(0, step))


def test_another_seed_has_another_order(data: ImageData) -> None:
    assert numbers_of(task_on(data).batch(0, 0)) != numbers_of(task_on(data, seed=6).batch(0, 0))


def test_augmentation_differs_between_workers_steps_and_epochs(data: ImageData) -> None:
    """A black border shows where an image was shifted to."""
    task = task_on(data, augment=True, worker_batch_size=16)
    borders = {
        (worker, step): task.batch(worker, step)[0][:, 0] == 0
        for worker in range(2)
        for step in range(3)
    }
    assert len({tuple(border.flatten().tolist()) for border in borders.values()}) == 6
    plain = task_on(data, augment=False, worker_batch_size=16)
    assert not bool((plain.batch(0, 0)[0] == 0).any())


def test_a_further_batch_is_independent_of_the_first(data: ImageData) -> None:
    task = task_on(data)
    places = [(worker, step) for step in range(40) for worker in range(WORKERS)]
    extra = {place: numbers_of(task.extra_batch(*place)) for place in places}
    assert extra == {
        place: numbers_of(task_on(data).extra_batch(*place)) for place in reversed(places)
    }
    assert len({tuple(numbers) for numbers in extra.values()}) == len(places)
    # 160 batches of 4 out of 75: two that have nothing to do with each other share 4 x 4 / 75
    # images on average.
    shared = [len(set(extra[place]) & set(numbers_of(task.batch(*place)))) for place in places]
    assert sum(shared) / len(shared) == pytest.approx(16 / 75, abs=0.12)
    drawn = torch.bincount(torch.tensor(list(extra.values())).flatten(), minlength=SAMPLES)
    assert len(drawn) == SAMPLES
    assert drawn.min() > 0


def test_a_batch_larger_than_the_data_is_refused_with_the_fix(data: ImageData) -> None:
    with pytest.raises(
        UsageError,
        match=r"a batch of 19 x 4 = 76 is larger than the 75 training samples: take fewer work",
    ):
        task_on(data, workers=19)
    assert task_on(data, workers=1, worker_batch_size=SAMPLES).steps_per_epoch == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_does_not_depend_on_how_it_is_cut(
    split: Any, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 3)
    nn.init.normal_(model.head.weight)
    results = []
    for size in (1, 7, 33, 500):
        monkeypatch.setattr(image_task, "EVALUATION_BATCH", size)
        results.append(evaluate(task_on(data), model, split, Ranks()))
    assert 0 < results[0]["accuracy"] < 1
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)


def test_evaluation_is_the_mean_over_the_split(data: ImageData) -> None:
    torch.manual_seed(0)
    model = ResNet(8, 4, 3).eval()
    with torch.no_grad():
        logits = model(data.x_test.permute(0, 3, 1, 2).float())
    task = task_on(data)
    assert task.evaluation_size("test") == 33
    found = evaluate(task, model, "test", Ranks())
    assert found["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, data.y_test).item(), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx(
        (logits.argmax(1) == data.y_test).double().mean().item()
    )


def test_evaluation_leaves_the_model_as_it_was(data: ImageData) -> None:
    model = ResNet(8, 4, 3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(task_on(data), model, "test", Ranks())
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_held_out_samples_are_not_trained_on() -> None:
    """On the real loader: training, validation and test share no image."""
    loaded = load_images(
        "synthetic", data_dir=None, offline=True, train_samples=None, validation=500
    )
    task = task_on(loaded, workers=1, worker_batch_size=1)
    splits = {
        "training": loaded.x_train,
        "validation": loaded.x_validation,
        "test": loaded.x_test,
    }
    images = {name: {image.numpy().tobytes() for image in split} for name, split in splits.items()}
    assert [len(split) for split in images.values()] == [8192 - 500, 500, 2000]
    assert len(set().union(*images.values())) == 8192 + 2000
    assert task.samples == 8192 - 500
    assert (task.evaluation_size("validation"), task.evaluation_size("test")) == (500, 2000)


def test_the_loss_is_the_cross_entropy_and_the_metric_the_share_of_right_answers(
    data: ImageData,
) -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])

    loss, accuracy = task_on(data).loss(Fixed(), (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])))
    e = torch.tensor(1.0).exp().item()
    expected = -(torch.tensor(e / (e + 2)).log() + torch.tensor(1 / (e**2 + 2)).log()) / 2
    assert loss.item() == pytest.approx(expected.item())
    assert accuracy.item() == 0.5
