"""Where data are looked for, and what is said where they are not."""

from pathlib import Path

import pytest

from egtrain.data.download import find_or_download
from egtrain.data.finding import (
    DataSet,
    File,
    Found,
    Layout,
    find,
    find_own,
    locate,
    require_own,
)
from egtrain.data.images import load_images
from egtrain.data.sets import IMAGES
from egtrain.errors import DataError, NotDownloaded

FOLDER, FILES = "tiny-bin", ("train.bin", "test.bin")
LAYOUT = Layout(FOLDER, tuple(map(File, FILES)))
TINY = DataSet("Tiny", (LAYOUT,), ())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; no other place has data."""
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def put_data(folder: Path, *names: str) -> Path:
    (folder / FOLDER).mkdir(parents=True)
    for name in names or FILES:
        (folder / FOLDER / name).touch()
    return folder / FOLDER


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_places_are_tried_in_the_documented_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = put_data(tmp_path / "cache" / "egtrain")
    assert find(TINY, home) == Found(TINY, cached, LAYOUT)
    monkeypatch.setenv("EGTRAIN_DATA", str(tmp_path / "shared"))
    shared = put_data(tmp_path / "shared")
    assert find(TINY, home) == Found(TINY, shared, LAYOUT)
    own = put_data(home)
    assert find(TINY, home) == Found(TINY, own, LAYOUT)
    assert find(TINY, own) == Found(TINY, own, LAYOUT)
    assert find(TINY, None) == Found(TINY, shared, LAYOUT)


def test_an_incomplete_folder_is_an_error_that_names_what_is_missing(home: Path) -> None:
    folder = put_data(home, "train.bin")
    for data_dir in (home, folder):
        with pytest.raises(
            DataError,
            match=rf"{folder}: Tiny is incomplete, test\.bin missing; .* delete the folder",
        ):
            find_or_download(TINY, data_dir, offline=False)


def test_a_complete_folder_elsewhere_is_taken_before_an_incomplete_one(
    home: Path, tmp_path: Path
) -> None:
    put_data(home, "train.bin")
    cached = put_data(tmp_path / "cache" / "egtrain")
    assert find(TINY, home) == Found(TINY, cached, LAYOUT)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_names_every_place_and_both_ways_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("EGTRAIN_DATA", str(tmp_path / "shared"))
    with pytest.raises(NotDownloaded) as caught:
        load_images(name, data_dir=home, offline=True, train_samples=None, validation=0)
    message = str(caught.value)
    for part in (
        home,
        tmp_path / "shared",
        tmp_path / "cache" / "egtrain",
        "--data-dir",
        "--data synthetic",
        "--offline",
    ):
        assert str(part) in message
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert everything_in(tmp_path) == ["data"]


def test_a_dry_run_can_say_where_public_data_lie(home: Path, tmp_path: Path) -> None:
    assert locate("synthetic", None, home, True) == "made when needed"
    cifar10 = IMAGES["cifar10"]
    assert locate("cifar10", cifar10, home, True).startswith(f"missing: not in {home}, ")
    planned = locate("cifar10", cifar10, home, False)
    assert planned == f"to be downloaded (162.2 MiB) to {home}"
    assert locate("tiny", TINY, put_data(home).parent, True) == f"found: {home / FOLDER}"
    folder = home / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").touch()
    with pytest.raises(DataError, match=r"incomplete, data_batch_2\.bin"):
        locate("cifar10", cifar10, home, True)
    assert not list((tmp_path / "cache").glob("*"))


def test_data_of_ones_own_are_looked_for_here_and_then_where_data_are(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("npz:own/x.npz", None, home, True) == "missing: own/x.npz"
    with pytest.raises(DataError, match=rf"own/x\.npz: no such file .* here or in {home}, "):
        require_own("npz:own/x.npz", home, "a file")
    (home / "x.npz").touch()  # moved into the data folder
    assert find_own("npz:own/x.npz", home) == home / "x.npz"
    (home / "own").mkdir()
    (home / "own" / "x.npz").touch()
    assert find_own("npz:own/x.npz", home) == home / "own" / "x.npz"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.npz").touch()
    assert locate("npz:own/x.npz", None, home, True) == "found: own/x.npz"
