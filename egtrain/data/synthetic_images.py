"""Ten classes of drawn shapes: images without a download, with a known best possible accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from egtrain.data.arrays import ImageArrays

Floats = NDArray[np.floating]

CLASSES = (
    "disc",
    "ring",
    "square",
    "frame",
    "diamond",
    "triangle",
    "plus",
    "cross",
    "level bars",
    "upright bars",
)
SIZE = 16
"""Height and width in pixels."""
WRONG_LABELS = 0.09
"""Fraction of training and test labels that name one of the nine other classes, as if one label in
ten were drawn again from all ten classes."""
_DATA_SEED = 0


@dataclass(frozen=True)
class SyntheticImages:
    """Drawn images with their labels, and the truth about them."""

    arrays: ImageArrays
    drawn_train: NDArray[np.int64]
    """The class that was drawn, which the label may contradict."""
    drawn_test: NDArray[np.int64]
    ceiling: float
    """Test accuracy of a perfect model: the exact fraction of right labels."""


def make_synthetic_images(train: int = 8192, test: int = 2000) -> SyntheticImages:
    """Draw the data set, the same on every call, in about a second.

    Only the shape depends on the class. Position, scale, tilt, both colours, which of them is the
    lighter, the texture of the background and a stray line are random. So all classes have nearly
    the same grey mean image, and a linear model learns almost nothing.
    """
    bits = np.random.PCG64(_DATA_SEED)
    x_train, drawn_train = _draw(bits, train)
    x_test, drawn_test = _draw(bits, test)
    y_train, y_test = _mislabel(bits, drawn_train), _mislabel(bits, drawn_test)
    arrays = ImageArrays(x_train, y_train, x_test, y_test, len(CLASSES))
    return SyntheticImages(
        arrays, drawn_train, drawn_test, ceiling=float(np.mean(y_test == drawn_test))
    )


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...], low: float, high: float) -> Floats:
    # From PCG64's raw bits, which never change, unlike NumPy's distributions.
    fractions = (bits.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(
        np.float32
    ) * np.float32(2**-24)
    return (low + (high - low) * fractions).reshape(shape).astype(np.float32)


def _shuffled(bits: np.random.PCG64, count: int) -> NDArray[np.intp]:
    return np.argsort(bits.random_raw(count), kind="stable")


def _mislabel(bits: np.random.PCG64, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    labels = drawn.copy()
    wrong = _shuffled(bits, len(drawn))[: round(WRONG_LABELS * len(drawn))]
    step = 1 + (bits.random_raw(len(wrong)) % np.uint64(len(CLASSES) - 1)).astype(np.int64)
    labels[wrong] = (labels[wrong] + step) % len(CLASSES)
    return labels


def _draw(bits: np.random.PCG64, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    drawn = (np.arange(count) % len(CLASSES))[_shuffled(bits, count)].astype(np.int64)

    def random(low: float, high: float, *shape: int) -> Floats:
        return _uniform(bits, (count, *(shape or (1, 1))), low, high)

    # Pixel centres, in units of half the image's width: y points down, x to the right.
    ticks = (np.arange(SIZE, dtype=np.float32) + 0.5) / (SIZE / 2) - 1
    y, x = ticks[None, :, None], ticks[None, None, :]

    scale, tilt = random(0.42, 0.78), random(-0.25, 0.25)
    room = 1.05 - scale
    dx, dy = x - random(-1, 1) * room, y - random(-1, 1) * room
    u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / scale
    v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / scale
    outside = np.empty((count, SIZE, SIZE), np.float32)
    for label in range(len(CLASSES)):
        of_class = drawn == label
        outside[of_class] = _distance(label, u[of_class], v[of_class])
    shape = np.clip(0.5 - outside * scale * (SIZE / 2), 0, 1)

    angle, offset = random(0, 2 * np.pi), random(-1, 1)
    line = np.clip(1 - np.abs(dx * np.cos(angle) + dy * np.sin(angle) - offset) * (SIZE / 2), 0, 1)
    angle, waves, phase = random(0, 2 * np.pi), random(1, 9), random(0, 2 * np.pi)
    grating = np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)

    background = random(0.3, 0.7, 1, 1, 3)
    contrast = random(0.2, 0.45, 1, 1, 1) * np.sign(random(-1, 1, 1, 1, 1)) + random(
        -0.1, 0.1, 1, 1, 3
    )
    pixels = background + grating[..., None] * random(-0.1, 0.1, 1, 1, 3)
    pixels += line[..., None] * random(-0.3, 0.3, 1, 1, 3)
    pixels += shape[..., None] * (contrast + background - pixels)
    pixels += random(-0.15, 0.15, SIZE, SIZE, 3)
    return np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8), drawn


def _distance(label: int, u: Floats, v: Floats) -> Floats:
    """Return the rough distance of points (u, v) from a shape of unit size, negative inside it."""
    across, down = np.abs(u), np.abs(v)
    box, diagonal = np.maximum(across, down), np.float32(0.5**0.5)
    distance: Floats
    match CLASSES[label]:
        case "disc":
            distance = np.hypot(u, v) - 0.85
        case "ring":
            distance = np.abs(np.hypot(u, v) - 0.72) - 0.22
        case "square":
            distance = box - 0.78
        case "frame":
            distance = np.abs(box - 0.68) - 0.2
        case "diamond":
            distance = (across + down) * diagonal - 0.72
        case "triangle":
            distance = np.maximum(across * 0.866 - (v - 0.1) * 0.5, v - 0.1) - 0.55
        case "plus":
            distance = _plus(across, down)
        case "cross":
            distance = _plus(np.abs(u + v) * diagonal, np.abs(u - v) * diagonal)
        case "level bars":
            distance = np.maximum(across - 0.85, np.abs(down - 0.55) - 0.25)
        case _:
            distance = np.maximum(down - 0.85, np.abs(across - 0.55) - 0.25)
    return distance


def _plus(across: Floats, down: Floats) -> Floats:
    distance: Floats = np.minimum(
        np.maximum(across - 0.9, down - 0.26), np.maximum(down - 0.9, across - 0.26)
    )
    return distance
