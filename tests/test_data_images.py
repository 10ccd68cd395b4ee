"""Splits, statistics and digests of image data, and where a dry run says that they lie."""

from pathlib import Path

import numpy as np
import pytest
import torch

from egtrain.data.images import ImageData, load_images
from egtrain.data.sets import IMAGES
from egtrain.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    x = generator.integers(0, 256, (300, 9, 8, 3), np.uint8)
    x[:, :, :, 2] = 7
    np.savez(path, x_train=x, y_train=np.arange(300) % 4, x_test=x[:20], y_test=np.arange(20) % 4)
    return path


def load(file: Path, train_samples: int | None = None, validation: int = 0) -> ImageData:
    return load_images(
        f"npz:{file}",
        data_dir=None,
        offline=True,
        train_samples=train_samples,
        validation=validation,
    )


def contents(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_without_a_split_the_images_keep_the_order_of_the_file(file: Path) -> None:
    data = load(file)
    assert np.array_equal(data.x_train.numpy(), np.load(file)["x_train"])
    assert data.x_validation.shape == (0, 9, 8, 3)
    assert data.y_validation.shape == (0,)
    assert data.ceiling is None


def test_the_splits_are_disjoint_and_keep_each_label_with_its_image(file: Path) -> None:
    whole, data = load(file), load(file, validation=60)
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (240, 60, 20)
    assert not set(contents(data.x_train)) & set(contents(data.x_validation))
    label_of = dict(zip(contents(whole.x_train), whole.y_train.tolist(), strict=True))
    assert [label_of[image] for image in contents(data.x_train)] == data.y_train.tolist()
    assert [label_of[image] for image in contents(data.x_validation)] == data.y_validation.tolist()
    assert (
        len(set(data.y_validation.tolist())) == 4
    )  # drawn at random, not cut off the end of a sorted file
    assert torch.equal(data.x_test, whole.x_test)


def test_the_split_is_the_same_for_ever(file: Path) -> None:
    # Another permutation would make earlier results incomparable.
    whole, data = load(file), load(file, validation=5)
    order = contents(whole.x_train)
    assert [order.index(image) for image in contents(data.x_validation)] == [17, 97, 214, 260, 284]


def test_a_smaller_training_set_is_a_part_of_a_larger_one_and_validation_comes_first(
    file: Path,
) -> None:
    small, large = load(file, 50, 60), load(file, 200, 60)
    assert set(contents(small.x_train)) < set(contents(large.x_train))
    assert torch.equal(small.x_validation, large.x_validation)
    assert len(small.x_train) == 50
    assert small.digest != large.digest


def test_mean_and_deviation_are_those_of_the_training_pixels_alone(file: Path) -> None:
    data = load(file, 100, 60)
    pixels = data.x_train.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert data.std[:2] == pytest.approx(
        pixels.std((0, 1, 2), correction=0).tolist()[:2], abs=1e-12
    )
    assert data.mean != load(file).mean


def test_a_constant_channel_has_a_deviation_that_can_be_divided_by(file: Path) -> None:
    assert load(file).std[2] == pytest.approx(1 / 255)


def test_the_digest_tells_labels_apart(file: Path) -> None:
    before = load(file).digest
    arrays = dict(np.load(file))
    arrays["y_test"] = np.roll(arrays["y_test"], 1)
    np.savez(file, **arrays)
    assert load(file).digest != before


@pytest.mark.parametrize(
    ("train_samples", "validation", "message"),
    [
        (None, 300, r"data\.validation: 300 .* use 0 to 299"),
        (None, -1, r"data\.validation: -1 .* use 0 to 299"),
        (301, 0, r"data\.train_samples: 301 .* use 1 to 300"),
        (241, 60, r"data\.train_samples: 241 .* 60 are held out; use 1 to 240"),
        (0, 0, r"data\.train_samples: 0 .* use 1 to 300"),
    ],
)
def test_an_impossible_split_names_the_possible_maximum(
    file: Path, train_samples: int | None, validation: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(file, train_samples, validation)


def test_an_unknown_name_lists_the_known_ones() -> None:
    for name in ("cifar", "", "../cifar10"):
        with pytest.raises(
            UsageError,
            match=f"^unknown image data '{name}'; use {', '.join(IMAGES)}, synthetic, npz:",
        ):
            load_images(name, data_dir=None, offline=True, train_samples=None, validation=0)


def test_whoever_trains_on_a_part_of_the_images_is_told(file: Path) -> None:
    assert load(file).notes == ()
    assert load(file, validation=60).notes == ()
    assert load(file, 300).notes == ()
    assert load(file, 50, 60).notes == (
        "only 50 of your 240 training images are used; --set data.train_samples=null uses all",
    )
    embedded = load_images("synthetic", data_dir=None, offline=True, train_samples=50, validation=0)
    assert embedded.notes == ()  # that is what the preset is
