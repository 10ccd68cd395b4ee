"""Crop and flip agree with a loop over images; all their choices come from the generator;
normalising is exact.
"""

import numpy as np
import pytest
import torch

from egtrain.data.augment import normalise, random_crop_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, height: int = 12, width: int = 9) -> torch.Tensor:
    # Never 0, so that black is the border alone.
    return torch.randint(
        1, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator(99)
    )


def crops_by_hand(image: np.ndarray, padding: int) -> dict[tuple[int, int, bool], np.ndarray]:
    """Every outcome that one image can have: (top, left, mirrored) to pixels."""
    height, width, _ = image.shape
    outcomes = {}
    for mirrored in (False, True):
        source = image[:, ::-1] if mirrored else image
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                crop = np.zeros_like(image)
                for row in range(height):
                    for column in range(width):
                        y, x = row + top - padding, column + left - padding
                        if 0 <= y < height and 0 <= x < width:
                            crop[row, column] = source[y, x]
                outcomes[top, left, mirrored] = crop
    return outcomes


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_every_result_is_one_of_the_crops_that_a_loop_makes_and_every_crop_occurs(
    padding: int,
) -> None:
    outcomes = crops_by_hand(random_images(1)[0].numpy(), padding)
    names = {crop.tobytes(): key for key, crop in outcomes.items()}
    assert len(names) == 2 * (2 * padding + 1) ** 2

    results = random_crop_flip(random_images(1).expand(1000, -1, -1, -1), generator(), padding)

    met = [names[result.tobytes()] for result in results.numpy()]
    assert set(met) == set(outcomes)
    assert 0.4 < np.mean([mirrored for _, _, mirrored in met]) < 0.6


def test_each_image_of_a_batch_gets_its_own_crop_of_itself() -> None:
    images = random_images(40)
    results = random_crop_flip(images, generator(), 2).numpy()
    keys = []
    for image, result in zip(images.numpy(), results, strict=True):
        names = {crop.tobytes(): key for key, crop in crops_by_hand(image, 2).items()}
        keys.append(names[result.tobytes()])
    assert len(set(keys)) > 10


def test_the_same_generator_state_gives_the_same_result_and_another_a_different_one() -> None:
    images = random_images(64)
    first = random_crop_flip(images, generator(1), 4)
    torch.manual_seed(123)  # the global stream must not matter
    assert torch.equal(first, random_crop_flip(images, generator(1), 4))
    assert not torch.equal(first, random_crop_flip(images, generator(2), 4))


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    random_crop_flip(random_images(4), generator(), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_the_input_is_left_as_it_was_and_shape_and_type_are_kept() -> None:
    images = random_images(16)
    copy = images.clone()
    result = random_crop_flip(images, generator(), 4)
    assert torch.equal(images, copy)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    assert result.data_ptr() != images.data_ptr()


def test_the_border_is_raw_black() -> None:
    white = torch.full((200, 8, 8, 3), 255, dtype=torch.uint8)
    result = random_crop_flip(white, generator(), 2)
    assert set(result.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalise_matches_the_formula_in_float64(channels_last: bool) -> None:
    images, mean, std = random_images(5), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    expected = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    result = normalise(images, mean, std, channels_last)
    assert result.dtype == torch.float32
    assert result.shape == (5, 3, 12, 9)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=2e-6)


def test_normalise_orders_the_memory_as_asked() -> None:
    images = random_images(5)
    last = normalise(images, (0.5,) * 3, (0.2,) * 3, True)
    first = normalise(images, (0.5,) * 3, (0.2,) * 3, False)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert first.is_contiguous()
    assert torch.equal(last, first)


def test_normalise_takes_the_mean_and_deviation_of_each_call() -> None:
    images = random_images(3)
    first = normalise(images, (0.5,) * 3, (0.2,) * 3, True)
    normalise(images, (0.1,) * 3, (0.3,) * 3, True)
    assert torch.equal(first, normalise(images, (0.5,) * 3, (0.2,) * 3, True))
