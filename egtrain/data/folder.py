"""A user's folder of images, `train/CLASS/*.jpg`: decoded once, in parallel, and kept decoded."""

import hashlib
import math
import os
import stat
import struct
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from egtrain.data.arrays import ImageArrays
from egtrain.data.finding import cache_folder
from egtrain.data.npz import SMALLEST
from egtrain.disk import locked, replacing
from egtrain.errors import DataError, EgtrainError
from egtrain.progress import Progress

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
VERSION = 1
"""Of how images are decoded; another one makes the cache anew."""
_SHAPE = struct.Struct("<4q")
"""Images, height, width and three channels, at the beginning of a cache file."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Split:
    """The files of a part of the folder, and their classes by number."""

    files: list[Path]
    labels: NDArray[np.int64]


def read_folder(folder: Path, image_size: int | None) -> ImageArrays:
    """Read `train/CLASS/` and `test/CLASS/` or `val/CLASS/`; with both, `val` is for validation.

    Images come back as uint8 `[images, height, width, 3]`: grey ones, palettes and CMYK as RGB,
    16-bit ones in 8 bits, without transparency, turned as their camera says. Classes are the
    folders of `train` in the order of their names.

    The decoded images are kept in the user cache, under a key of all names, sizes and times of the
    files. Changed files are decoded anew, and replace what was kept of this folder and size.

    Args:
        folder: the folder.
        image_size: pixels; the middle square of each image is scaled to this size. None: the images
            are of one size already.

    Raises:
        DataError: a part is missing or empty, an image is damaged or of another size, or a link
            leads out of the folder.
    """
    train = _split_of(folder, "train", None)
    classes = sorted({file.parent.name for file in train.files})
    others = {
        name: _split_of(folder, name, classes)
        for name in ("test", "val")
        if (folder / name).is_dir()
    }
    if not others:
        raise DataError(
            f"{folder}: there is no folder test or val: put held-out images into test/CLASS/"
        )
    test = others.get("test", others.get("val"))
    assert test is not None
    splits = [train, test, *([others["val"]] if len(others) == 2 else [])]
    images = _decoded_once(folder, [file for part in splits for file in part.files], image_size)
    ends = np.cumsum([len(part.files) for part in splits])
    x_train, x_test, *further = np.split(images, ends[:-1])
    arrays = ImageArrays(x_train, train.labels, x_test, test.labels, len(classes))
    if not further:
        return arrays
    return arrays._replace(x_validation=further[0], y_validation=others["val"].labels)


def _split_of(folder: Path, name: str, classes: list[str] | None) -> _Split:
    """Return the images of a part of the folder, in the order of their names.

    `classes` are those of `train`; None: any.
    """
    place = folder / name
    if not place.is_dir():
        raise DataError(f"{folder}: there is no folder {name}: put images into {name}/CLASS/")
    _require_inside(place, folder)
    found = [path for path in _entries(place) if path.is_dir() or path.is_symlink()]
    if classes is None and len(found) < 2:
        raise DataError(
            f"{place}: there are no two folders of classes: put images into {name}/CLASS/"
        )
    files: list[Path] = []
    labels: list[int] = []
    for number, path in enumerate(found):
        if classes is not None and path.name not in classes:
            raise DataError(f"{path}: train has no class '{path.name}': rename or remove it")
        _require_inside(path, folder)
        own = [file for file in _entries(path) if file.suffix.lower() in ENDINGS]
        if not own:
            raise DataError(
                f"{path}: there is no image ({', '.join(ENDINGS)}): add some, or remove the folder"
            )
        for file in own:
            _require_inside(file, folder)
        files += own
        labels += [number if classes is None else classes.index(path.name)] * len(own)
    return _Split(files, np.array(labels, np.int64))


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, by name."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}): remove it") from error


def _require_inside(path: Path, folder: Path) -> None:
    if not path.is_symlink():
        return
    if not path.exists():
        raise DataError(f"{path}: a link that leads nowhere: remove it")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{path}: a link that leads out of {folder}: put the images themselves there"
        )


def _decoded_once(folder: Path, files: list[Path], image_size: int | None) -> Bytes:
    """Return the images of all files, from the cache if it has them."""
    here = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    same = f"{here}-{image_size or 'own'}"
    cached = cache_folder() / "folders" / f"{same}-{_key(folder, files)}.bin"
    images = _read_cached(cached, len(files))
    if images is not None:
        return images
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with locked(cached.parent):
            # Another process may have decoded them while this one waited.
            images = _read_cached(cached, len(files))
            if images is None:
                images = _decoded(files, image_size)
                _write_cached(cached, images)
    except DataError:
        raise
    except (OSError, EgtrainError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        print(f"warning: the decoded images are not kept ({reason})", file=sys.stderr)
        return _decoded(files, image_size) if images is None else images
    for old in cached.parent.glob(f"{same}-*.bin"):
        if old != cached:
            with suppress(OSError):
                old.unlink()
    return images


def _key(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(f"{VERSION}\n".encode())
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}): remove it") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file}: this is no file: remove it")
        name = os.fsencode(file.relative_to(folder))
        digest.update(name + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _write_cached(path: Path, images: Bytes) -> None:
    """Write the shape, the bytes and a SHA-256 of both."""
    shape = _SHAPE.pack(*images.shape)
    with replacing(path) as output:
        output.write(shape)
        output.write(images.data)
        output.write(hashlib.sha256(shape + _digest(images)).digest())


def _read_cached(path: Path, count: int) -> Bytes | None:
    """Return the images of a cache file, or None if it is not there or not whole."""
    try:
        with path.open("rb") as file:
            head = file.read(_SHAPE.size)
            shape = _SHAPE.unpack(head)
            size = math.prod(shape)
            whole = _SHAPE.size + size + hashlib.sha256().digest_size
            fits = shape[0] == count and shape[3] == 3 and min(shape) > 0
            if not fits or os.fstat(file.fileno()).st_size != whole:
                return None
            file.seek(_SHAPE.size + size)
            expected = file.read()
        # Copied on write: nothing that is done to the images reaches the file.
        images: Bytes = np.memmap(path, np.uint8, "c", offset=_SHAPE.size, shape=shape)
    except (OSError, struct.error):
        return None
    return images if hashlib.sha256(head + _digest(images)).digest() == expected else None


def _digest(images: Bytes) -> bytes:
    return hashlib.sha256(images.data).digest()


def _decoded(files: list[Path], image_size: int | None) -> Bytes:
    """Decode all files, in as many threads as there are cores: Pillow decodes without the GIL."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores)
    with (
        warnings.catch_warnings(),
        Progress(sys.stderr) as progress,
        progress.bar("decoding images", len(files)) as bar,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            result: Bytes | None = None
            for number, image in enumerate(_in_order(pool, files, image_size)):
                if result is None:
                    if min(image.shape[:2]) < SMALLEST:
                        raise DataError(
                            f"{files[0]}: it has {_size(image)} pixels (height x width), and "
                            f"images need at least {SMALLEST} x {SMALLEST}: take larger ones"
                        )
                    result = np.empty((len(files), *image.shape), np.uint8)
                if image.shape != result.shape[1:]:
                    raise DataError(
                        f"{files[number]}: it has {_size(image)} pixels (height x width), and "
                        f"{files[0]} has {_size(result[0])}: give a size for all, such as "
                        "--set data.image_size=224"
                    )
                result[number] = image
                bar.update(number + 1)
        finally:
            pool.shutdown(cancel_futures=True)
    assert result is not None
    return result


def _in_order(
    pool: ThreadPoolExecutor, files: list[Path], image_size: int | None
) -> Iterator[Bytes]:
    """Yield the images in the order of the files, some of which are decoded ahead."""
    ahead = 256
    futures = [pool.submit(_image, file, image_size) for file in files[:ahead]]
    for number in range(len(files)):
        yield futures[number % ahead].result()
        if number + ahead < len(files):
            futures[number % ahead] = pool.submit(_image, files[number + ahead], image_size)


def _image(path: Path, image_size: int | None) -> Bytes:
    """Decode an image to uint8 `[height, width, 3]`."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if image_size is not None:
                file.draft(
                    "RGB", (image_size, image_size)
                )  # a JPEG decodes to a smaller one faster
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits
                values = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # of any kind: the file may hold anything
        raise DataError(
            f"{path}: not a readable image ({' '.join(str(error).split())[:200]}): repair it, or "
            "remove it"
        ) from error


def _size(image: Bytes) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
