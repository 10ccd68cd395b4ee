"""A folder of images: decoded once, checked, and kept under a key of names, sizes and times."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import Forked
from PIL import Image

from egtrain.data import folder as folder_module
from egtrain.data.folder import read_folder
from egtrain.data.images import load_images
from egtrain.errors import DataError, UsageError

Numbers = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    return tmp_path / "cache/egtrain/folders"


def pixels(height: int = 12, width: int = 10) -> np.ndarray:
    return Numbers.integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, image: np.ndarray | Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (
        image
        if isinstance(image, Image.Image)
        else Image.fromarray(pixels() if image is None else image)
    )
    whole.save(path)
    return path


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Return a folder with three classes, of 4 training and 2 test images each."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("rose", "aster", "lily"):
            for number in range(count):
                write(tmp_path / f"flowers/{split}/{name}/{number}.png")
    return tmp_path / "flowers"


def test_images_come_in_the_order_of_classes_and_names(flowers: Path) -> None:
    (flowers / "train/rose/notes.txt").write_text("not an image")
    arrays = read_folder(flowers, None)
    assert arrays.classes == 3
    assert arrays.x_train.shape == (12, 12, 10, 3)
    assert arrays.y_train.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert arrays.y_test.tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays.x_validation is None
    for number, name in enumerate(("aster", "lily", "rose")):
        with Image.open(flowers / f"test/{name}/1.png") as image:
            assert np.array_equal(arrays.x_test[2 * number + 1], np.asarray(image))


def test_val_stands_for_test_or_beside_it_for_validation(flowers: Path) -> None:
    with_test = read_folder(flowers, None)
    (flowers / "test").rename(flowers / "val")
    alone = read_folder(flowers, None)
    assert np.array_equal(alone.x_test, with_test.x_test)
    write(flowers / "test/lily/0.png")
    both = read_folder(flowers, None)
    assert both.x_validation is not None
    assert np.array_equal(both.x_validation, with_test.x_test)
    assert both.y_test.tolist() == [1]
    whole = {"data_dir": None, "offline": True, "train_samples": None}
    loaded = load_images(f"folder:{flowers}", **whole, validation=0)  # type: ignore[arg-type]
    assert len(loaded.y_validation) == 6
    with pytest.raises(UsageError, match="has a validation part already"):
        load_images(f"folder:{flowers}", **whole, validation=2)  # type: ignore[arg-type]


def test_other_kinds_of_images_become_rgb(tmp_path: Path) -> None:
    colour = pixels(16, 16)
    place = tmp_path / "d/train/a"
    grey = Image.fromarray(colour[:, :, 0])
    write(place / "0.png", grey)
    write(place / "1.png", Image.fromarray(colour).convert("P"))
    transparent = np.dstack([colour, np.full((16, 16), 7, np.uint8)])
    write(place / "2.png", Image.fromarray(transparent))
    write(place / "3.jpg", Image.fromarray(colour).convert("CMYK"))
    write(place / "4.png", Image.fromarray(colour[:, :, 0].astype(np.uint16) * 257))
    write(place / "5.webp", colour)
    turned = Image.fromarray(colour)
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(place / "6.png", exif=exif)
    write(tmp_path / "d/train/b/0.png", colour)
    write(tmp_path / "d/val/a/0.PNG", colour)
    images = read_folder(tmp_path / "d", None).x_train
    grey_as_rgb = np.repeat(colour[:, :, :1], 3, axis=2)
    assert np.array_equal(images[0], grey_as_rgb)
    assert np.array_equal(images[2], colour)
    assert np.array_equal(images[4], grey_as_rgb)
    assert np.array_equal(images[6], colour[::-1, ::-1])


def test_images_of_all_sizes_are_scaled_to_the_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = [10, 200, 30]
    write(tmp_path / "d/train/a/0.png", wide)
    write(tmp_path / "d/train/a/1.jpg", pixels(300, 200))
    write(tmp_path / "d/train/b/0.png", pixels(20, 20))
    write(tmp_path / "d/test/a/0.png", pixels(9, 9))
    arrays = read_folder(tmp_path / "d", 16)
    assert arrays.x_train.shape == (3, 16, 16, 3)
    middle = arrays.x_train[0, :, 2:-2]  # at the ends the filter sees what is beside the square
    assert (middle == [10, 200, 30]).all()
    with pytest.raises(DataError, match=r"300 x 200 pixels .*--set data.image_size=224"):
        read_folder(tmp_path / "d", None)


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how many images were decoded since its last call."""
    decoded: list[Path] = []
    original = folder_module._image

    def image(path: Path, size: int | None) -> object:
        decoded.append(path)
        return original(path, size)

    monkeypatch.setattr(folder_module, "_image", image)

    def count() -> int:
        number = len(decoded)
        decoded.clear()
        return number

    return count


def test_images_are_decoded_once_and_anew_where_a_file_changed(
    flowers: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = counted(monkeypatch)
    first = read_folder(flowers, None)
    assert count() == 18
    again = read_folder(flowers, None)
    assert count() == 0
    assert np.array_equal(again.x_train, first.x_train)
    again.x_train[:] = 0  # what is done to the images stays here
    assert np.array_equal(read_folder(flowers, None).x_train, first.x_train)
    read_folder(flowers, 16)
    assert count() == 18
    os.utime(flowers / "train/rose/0.png", ns=(1, 1))
    read_folder(flowers, None)
    assert count() == 18
    assert len(list(cache.iterdir())) == 2  # one for each size


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other", "turned"])
def test_a_damaged_cache_is_made_again(
    damage: str, flowers: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_folder(flowers, None)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[500] ^= 1
    turned = content[:8] + content[16:24] + content[8:16] + content[24:]  # width and height
    contents = {"cut": content[:-40], "flipped": flipped, "emptied": b"", "turned": turned}
    file.write_bytes({**contents, "other": b"x" * 300}[damage])
    count = counted(monkeypatch)
    assert np.array_equal(read_folder(flowers, None).x_train, first.x_train)
    assert count() == 18


def test_a_cache_that_cannot_be_written_is_done_without(
    flowers: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert len(read_folder(flowers, None).x_train) == 12
    assert "the decoded images are not kept" in capsys.readouterr().err


def spoil_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def moved_out(folder: Path) -> None:
    (folder / "test").rename(folder.parent / "elsewhere")
    (folder / "test").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "train").rename(d / "training"), "there is no folder train"),
        (lambda d: (d / "test").rename(d / "tests"), "there is no folder test or val"),
        (lambda d: (d / "train/empty").mkdir(), "train/empty: there is no image"),
        (lambda d: write(d / "test/tulip/0.png"), "train has no class 'tulip'"),
        (lambda d: spoil_image(d / "train/lily/2.png"), "train/lily/2.png: not a readable image"),
        (lambda d: (d / "train/lily/2.png").write_text("x"), "2.png: not a readable image"),
        (lambda d: (d / "train/lily/9.jpg").mkdir(), "9.jpg: this is no file"),
        (lambda d: os.mkfifo(d / "train/lily/9.jpg"), "9.jpg: this is no file"),
        (lambda d: (d / "train/lily/9.jpg").symlink_to("9.jpg"), "9.jpg: a link that leads nowh"),
        (lambda d: (d / "train/gone").symlink_to("nothing"), "train/gone: a link that leads nowh"),
        (lambda d: moved_out(d), "test: a link that leads out of"),
        (lambda d: write(d / "train/lily/9.png", pixels(8, 9)), "9.png: it has 8 x 9 pixels"),
        (lambda d: write(d / "train/aster/-.png", pixels(4, 9)), "at least 8 x 8"),
        (
            lambda d: (d / "train/lily/9.png").symlink_to(write(d.parent / "outside.png")),
            "9.png: a link that leads out of",
        ),
        (lambda d: (d / "train/out").symlink_to(d.parent), "train/out: a link that leads out of"),
        (lambda d: (d / "train/lily/9.png").symlink_to("nothing.png"), "9.png: a link that leads"),
    ],
)
def test_a_folder_with_a_fault_is_refused_with_its_place(
    change: Callable[[Path], object], message: str, flowers: Path, cache: Path
) -> None:
    change(flowers)
    with pytest.raises(DataError) as caught:
        read_folder(flowers, None)
    assert message in str(caught.value)
    assert not list(cache.glob("*"))


def test_a_link_that_stays_inside_is_followed(flowers: Path) -> None:
    (flowers / "train/lily/9.png").symlink_to(flowers / "train/rose/0.png")
    assert len(read_folder(flowers, None).x_train) == 13


def test_an_image_that_would_fill_the_memory_is_named(
    flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="not a readable image"):
        read_folder(flowers, None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process")
def test_the_command_line_trains_on_a_folder_and_names_a_damaged_image(
    flowers: Path, tmp_path: Path
) -> None:
    command = ["train", "--preset", "quickstart", "--data", f"folder:{flowers}", "--workers", "2"]
    for setting in ("worker_batch_size=4", "steps=2", "model.width=2", "threads=1"):
        command += ["--set", setting]
    with Forked([*command, "--output", "run", "--device", "cpu"], tmp_path) as process:
        assert process.wait() == 0, process.stderr
    spoil_image(flowers / "train/lily/2.png")
    with Forked([*command, "--output", "other"], tmp_path) as process:
        assert process.wait() == 3
        (line,) = process.stderr.splitlines()
    assert "train/lily/2.png: not a readable image" in line
    assert not (tmp_path / "other").exists()
