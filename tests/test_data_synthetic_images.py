"""The drawn images: the same everywhere, with the stated share of wrong labels, and beyond a linear
model.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from egtrain.data.images import ImageData, load_images
from egtrain.data.synthetic_images import (
    CLASSES,
    WRONG_LABELS,
    SyntheticImages,
    make_synthetic_images,
)


@pytest.fixture(scope="module")
def drawn() -> SyntheticImages:
    return make_synthetic_images()


def load() -> ImageData:
    return load_images(
        "synthetic",
        data_dir=Path("no such folder"),
        offline=True,
        train_samples=None,
        validation=0,
    )


def test_the_images_are_the_same_on_every_call() -> None:
    first, second = load(), load()
    assert first.digest == second.digest
    assert torch.equal(first.x_train, second.x_train)


def test_the_labels_are_the_published_ones(drawn: SyntheticImages) -> None:
    # Held by their hash, so that results of two versions stay comparable; labels involve no
    # floating-point rounding.
    labels = np.concatenate([drawn.arrays.y_train, drawn.arrays.y_test]).astype(np.uint8)
    assert (
        hashlib.sha256(labels.tobytes()).hexdigest()
        == "4e61b7bd9da6cd974408078af8f95336b3ac373ca23d85ac17599bc5d6f721d7"
    )


def test_shapes_types_and_sizes(drawn: SyntheticImages) -> None:
    data = load()
    assert data.x_train.shape == (8192, 16, 16, 3)
    assert data.x_test.shape == (2000, 16, 16, 3)
    assert data.x_train.dtype == torch.uint8
    assert data.y_train.dtype == torch.int64
    assert data.classes == len(CLASSES) == 10
    for labels in (drawn.drawn_train, drawn.drawn_test):
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_share_of_wrong_labels_is_the_stated_one_and_they_are_spread_evenly(
    drawn: SyntheticImages,
) -> None:
    for labels, truth in (
        (drawn.arrays.y_train, drawn.drawn_train),
        (drawn.arrays.y_test, drawn.drawn_test),
    ):
        wrong = labels != truth
        assert wrong.sum() == round(WRONG_LABELS * len(labels))
        steps = np.bincount((labels[wrong] - truth[wrong]) % 10, minlength=10)[1:]
        assert steps.min() > 0.5 * wrong.sum() / 9
        assert steps.max() < 1.7 * wrong.sum() / 9


def test_the_ceiling_is_the_accuracy_of_a_perfect_model(drawn: SyntheticImages) -> None:
    assert (
        load().ceiling == drawn.ceiling == np.mean(drawn.arrays.y_test == drawn.drawn_test) == 0.91
    )


def test_no_image_occurs_twice_nor_in_both_splits(drawn: SyntheticImages) -> None:
    images = np.concatenate([drawn.arrays.x_train, drawn.arrays.x_test])
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_convolutional_network_learns_what_a_linear_model_cannot(drawn: SyntheticImages) -> None:
    # Small and without wrong labels, so that a few seconds suffice: the gap is what matters.
    torch.manual_seed(0)
    order = np.argsort(drawn.drawn_train, kind="stable")
    two_classes = order[np.isin(drawn.drawn_train[order], [8, 9])]
    x = torch.from_numpy(drawn.arrays.x_train[two_classes]).permute(0, 3, 1, 2) / 255 - 0.5
    y = torch.from_numpy(drawn.drawn_train[two_classes]) - 8
    of_test = np.isin(drawn.drawn_test, [8, 9])
    x_test = torch.from_numpy(drawn.arrays.x_test[of_test]).permute(0, 3, 1, 2) / 255 - 0.5
    y_test = torch.from_numpy(drawn.drawn_test[of_test]) - 8

    def accuracy(model: nn.Module, rate: float, epochs: int) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(epochs):
            for chosen in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
        with torch.no_grad():
            return (model(x_test).argmax(1) == y_test).double().mean().item()

    linear = accuracy(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), 1e-3, 6)
    convolutional = accuracy(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        ),
        1e-2,
        6,
    )
    assert linear < 0.6
    assert convolutional > 0.85
