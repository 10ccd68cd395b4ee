import errno
import io
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from egtrain import checkpoint
from egtrain.checkpoint import (
    INDEX,
    MAGIC,
    CheckpointStore,
    read_checkpoint,
)
from egtrain.disk import write_atomically
from egtrain.errors import DataError, EgtrainError, UsageError

FAULT_POINTS = [
    "save-before-write",
    "save-mid-write",
    "save-before-sync",
    "save-before-rename",
    "save-before-index",
]


def state_of(step: int, size: int = 5000) -> dict[str, Any]:
    """Return the kind of state that a run saves, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "model": {
            "weight": torch.randn(size, generator=generator),
            "half": torch.ones(3, dtype=torch.bfloat16) * step,
        },
        "optimizer": {
            "state": {0: {"momentum": torch.randn(7, generator=generator)}},
            "param_groups": [{"lr": 0.1}],
        },
        "extrapolation": None,
        "betas": (0.9, 0.99),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def store_in(directory: Path, **options: Any) -> tuple[CheckpointStore, list[str]]:
    warnings: list[str] = []
    return CheckpointStore(directory, warn=warnings.append, **options), warnings


def files_in(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def steps_in(directory: Path) -> list[int]:
    return [int(name[5:13]) for name in files_in(directory) if name.endswith(".pt")]


def with_trailer(data: bytes) -> bytes:
    """Return a file with a matching checksum, which an attacker can make too."""
    import hashlib

    return data + hashlib.sha256(data).digest() + MAGIC


def saved_bytes(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the operating system refuse to write larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path)
    store.save(state_of(10), 10)
    store.save(state_of(20), 20)
    return tmp_path


def test_a_saved_state_is_loaded_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.load_newest() is None
    path = store.save(state_of(1234), 1234)
    assert path.name == "step-00001234.pt"
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded[0] == 1234
    assert equal(loaded[1], state_of(1234))
    assert equal(torch.load(path, weights_only=True)["state"], state_of(1234)), (
        "plain torch.load reads it too"
    )


def test_a_file_can_be_verified_where_there_is_no_index(two_saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "model.pt"
    copy.parent.mkdir()
    copy.write_bytes((two_saved / "step-00000020.pt").read_bytes())
    step, state = read_checkpoint(copy)
    assert step == 20
    assert equal(state, state_of(20))
    assert CheckpointStore(two_saved).load(str(copy))[0] == 20
    assert CheckpointStore(two_saved).load("step-00000010.pt")[0] == 10


def test_a_view_takes_no_more_room_than_its_own_elements(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000.0)
    expanded = torch.ones(1).expand(50)
    path = CheckpointStore(tmp_path).save(
        {"part": flat[10:20], "grid": flat[:6].view(2, 3).T, "one": expanded}, 1
    )
    assert path.stat().st_size < 10_000
    _, state = read_checkpoint(path)
    assert torch.equal(state["part"], flat[10:20])
    assert torch.equal(state["grid"], flat[:6].view(2, 3).T)
    assert torch.equal(state["one"], expanded)


@pytest.mark.parametrize(
    "alien", [{1, 2}, Path("x"), object(), torch.float32], ids=lambda value: type(value).__name__
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, alien: object) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
        CheckpointStore(tmp_path).save({"a": [1, alien]}, 1)
    assert steps_in(tmp_path) == []


# ---- kills

KILLED_SAVES = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import CheckpointStore, state_of
for folder in map(Path, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        os.environ["EGTRAIN_TEST_FAULT"] = folder.name + ":3"
        store = CheckpointStore(folder)
        for step in (10, 20, 30):
            store.save(state_of(step), step, final=step == 30)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="session")
def killed_saves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Path]]:
    """Make the same three saves once for each fault, and return how the process ended and its
    folder.

    They are children of one new process, since importing torch is what takes long.
    """
    parent = tmp_path_factory.mktemp("killed")
    folders = [parent / point for point in FAULT_POINTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHELASTIC_RESTART_COUNT", None)
    command = [sys.executable, "-c", KILLED_SAVES, str(Path(__file__).parent), *map(str, folders)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    exit_codes = map(int, result.stdout.split())
    return dict(zip(FAULT_POINTS, zip(exit_codes, folders, strict=True), strict=True))


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_inside_a_save_leaves_the_checkpoint_before_it(
    killed_saves: dict[str, tuple[int, Path]], point: str
) -> None:
    exit_code, folder = killed_saves[point]
    assert exit_code == -signal.SIGKILL
    if point == "save-mid-write":
        assert (folder / "step-00000030.pt.tmp").stat().st_size > 0
    store, warnings = store_in(folder)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded[0] == 20
    assert equal(loaded[1], state_of(20))
    assert warnings == []
    store.save(state_of(25), 25)
    assert not [name for name in files_in(folder) if name.endswith(".tmp")], (
        "leftovers of the killed save are removed"
    )
    assert store.load("last")[0] == 25
    store.save(state_of(30), 30)
    assert steps_in(folder) == [25, 30]


# ---- damage


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_skipped_with_a_warning_and_refused_by_name(
    two_saved: Path, share: float
) -> None:
    newest = two_saved / "step-00000020.pt"
    os.truncate(newest, int(newest.stat().st_size * share))
    assert_skipped_and_refused(two_saved, newest)


@pytest.mark.parametrize("position", [0.0, 0.01, 0.3, 0.77, 0.99, -41, -40, -20, -8, -1])
def test_one_flipped_bit_is_noticed(two_saved: Path, position: float) -> None:
    newest = two_saved / "step-00000020.pt"
    data = bytearray(newest.read_bytes())
    data[int(position if position < 0 else position * len(data))] ^= 0x10
    newest.write_bytes(data)
    assert_skipped_and_refused(two_saved, newest)


def test_a_missing_checkpoint_is_skipped_with_a_warning_and_refused_by_name(
    two_saved: Path,
) -> None:
    newest = two_saved / "step-00000020.pt"
    newest.unlink()
    assert_skipped_and_refused(two_saved, newest)


def assert_skipped_and_refused(directory: Path, damaged: Path) -> None:
    store, warnings = store_in(directory)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded[0] == 10
    assert equal(loaded[1], state_of(10))
    assert len(warnings) == 1
    assert str(damaged) in warnings[0]
    with pytest.raises(DataError, match=damaged.name) as caught:
        store.load(damaged)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_step_under_the_newest_name_is_skipped(two_saved: Path) -> None:
    (two_saved / "step-00000020.pt").write_bytes((two_saved / "step-00000010.pt").read_bytes())
    store, warnings = store_in(two_saved)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded[0] == 10
    assert len(warnings) == 1


def test_if_all_are_damaged_the_run_does_not_silently_start_again(two_saved: Path) -> None:
    for file in two_saved.glob("*.pt"):
        os.truncate(file, 100)
    store, warnings = store_in(two_saved)
    with pytest.raises(DataError, match="every checkpoint in"):
        store.load_newest()
    assert len(warnings) == 2


def test_going_on_from_before_a_damaged_checkpoint_replaces_it(two_saved: Path) -> None:
    os.truncate(two_saved / "step-00000020.pt", 100)
    store, warnings = store_in(two_saved)
    store.load_newest()
    store.save(state_of(15), 15)
    warnings.clear()
    assert store.load("last")[0] == 15
    assert warnings == []
    assert steps_in(two_saved) == [10, 15]


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\x00" * 300,
        b"[1]",
        b'{"format": 2, "checkpoints": [{"file": "../a/step-00000001.pt", '
        b'"step": 1, "metric": null, "final": false}]}',
        b'{"format": 2, "checkpoints": [{"file": "step-00000099.pt", "step": 1, '
        b'"metric": null, "final": false}]}',
    ],
)
def test_a_damaged_index_is_made_up_for_by_the_files(two_saved: Path, index: bytes) -> None:
    (two_saved / INDEX).write_bytes(index)
    store, warnings = store_in(two_saved)
    assert store.load("last")[0] == 20
    assert len(warnings) == 1
    store.save(state_of(30), 30)
    warnings.clear()
    assert store.load("last")[0] == 30
    assert warnings == []
    assert steps_in(two_saved) == [20, 30]


def test_a_file_that_the_index_does_not_name_is_ignored(two_saved: Path) -> None:
    (two_saved / "step-00000090.pt").write_bytes((two_saved / "step-00000020.pt").read_bytes())
    store, warnings = store_in(two_saved)
    assert store.load("last")[0] == 20
    assert warnings == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (1, "reads up to .: update egtrain"),
        (-1, "reads .: use the egtrain that wrote it, or start a new run"),
    ],
)
def test_another_format_is_refused_with_the_fix_and_not_skipped(
    change: int, problem: str, two_saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint.FORMAT + change
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", other)
        (two_saved / checkpoint.INDEX).unlink()
        newest = CheckpointStore(two_saved).save(state_of(30), 30)
    with pytest.raises(DataError, match=f"format {other}, and this egtrain {problem}"):
        read_checkpoint(newest)
    with pytest.raises(DataError, match=problem):
        CheckpointStore(two_saved).load_newest()


# ---- hostile files


class Exploit:
    """Leaves a file behind when it is unpickled by anything but a safe loader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, kind: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    mark = tmp_path / "the code has run"
    content = {"format": checkpoint.FORMAT, "step": 1, "state": {"model": Exploit(mark)}}
    buffer = io.BytesIO()
    if kind == "plain pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(with_trailer(buffer.getvalue()))
    with pytest.raises(DataError, match=r"step-00000001\.pt is") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if kind == "zip":
        path.write_bytes(buffer.getvalue())
        torch.load(path, weights_only=False)
        assert mark.exists(), "the exploit of this test works"


def test_a_compressed_record_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    plain = saved_bytes(
        {"format": checkpoint.FORMAT, "step": 1, "state": {"zeros": torch.zeros(4_000_000)}}
    )
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(plain)) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    assert len(packed.getvalue()) < 50_000
    path = tmp_path / "bomb.pt"
    path.write_bytes(with_trailer(packed.getvalue()))
    with pytest.raises(DataError, match=r"\(compressed\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1).expand(1 << 40), torch.empty(1 << 40, device="meta"), torch.eye(3).to_sparse()],
    ids=["expanded", "meta", "sparse"],
)
def test_a_tensor_that_declares_more_than_the_file_holds_is_refused(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    path = tmp_path / "huge.pt"
    path.write_bytes(
        with_trailer(
            saved_bytes({"format": checkpoint.FORMAT, "step": 1, "state": {"a": [{"b": tensor}]}})
        )
    )
    with pytest.raises(DataError, match=r"huge\.pt is not a checkpoint"):
        read_checkpoint(path)


def test_references_without_end_do_not_hang(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    path = tmp_path / "laughs.pt"
    path.write_bytes(
        with_trailer(saved_bytes({"format": checkpoint.FORMAT, "step": 1, "state": {"a": nested}}))
    )
    assert read_checkpoint(path)[0] == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"x" * 1000,
        saved_bytes({"weight": torch.zeros(3)}),
        with_trailer(b""),
        with_trailer(b"PK\x03\x04 not a zip"),
        with_trailer(saved_bytes([1, 2])),
        with_trailer(saved_bytes({"weight": torch.zeros(3)})),
        with_trailer(saved_bytes({"format": checkpoint.FORMAT, "step": "1", "state": {}})),
        with_trailer(
            saved_bytes({"format": checkpoint.FORMAT, "step": 1, "state": {}}, legacy=True)
        ),
        with_trailer(
            saved_bytes({"format": checkpoint.FORMAT, "step": 1, "state": {}}, legacy=True)
            + saved_bytes({})
        ),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"other\.pt") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing.pt"):
        with pytest.raises(DataError, match="there is no checkpoint file"):
            read_checkpoint(path)


# ---- what is kept


def test_the_last_two_the_best_and_the_final_one_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, higher_is_better=True)
    for step, metric in [(1, math.nan), (2, 0.9), (3, 0.5), (4, 0.9), (5, math.inf), (6, None)]:
        store.save(state_of(step), step, metric=metric, final=step == 4)
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    assert store.best() == (2, 0.9)
    assert store.load("best")[0] == 2
    assert store.load("last")[0] == 6
    store.save(state_of(7), 7, metric=0.95, final=True)
    assert steps_in(tmp_path) == [6, 7]


def test_the_best_may_be_the_lowest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, higher_is_better=False)
    for step, metric in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        store.save(state_of(step), step, metric=metric)
    assert steps_in(tmp_path) == [2, 3, 4]
    assert CheckpointStore(tmp_path).load("best")[0] == 2, "the index says what is better"


def test_an_index_that_does_not_say_what_is_better_gives_no_best_but_all_else(
    tmp_path: Path,
) -> None:
    for step, metric in enumerate([3.0, 1.0, 2.0], start=1):
        CheckpointStore(tmp_path, higher_is_better=False).save(state_of(step), step, metric=metric)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["higher_is_better"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    store, warnings = store_in(tmp_path)
    with pytest.raises(DataError, match=r"older egtrain.*name a step instead of best"):
        store.load("best")
    assert [store.load(which)[0] for which in ("last", "2")] == [3, 2]
    assert warnings == []
    CheckpointStore(tmp_path, higher_is_better=False).save(state_of(4), 4, metric=4.0)
    assert store.load("best")[0] == 2


def test_a_checkpoint_is_named_by_its_step(two_saved: Path) -> None:
    store = CheckpointStore(two_saved)
    assert [store.load(which)[0] for which in ("10", "020")] == [10, 20]
    with pytest.raises(UsageError, match="no checkpoint of step 15: the steps are 10, 20"):
        store.load("15")


def test_every_one_is_kept_where_that_was_asked_for(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep="all")
    for step in range(1, 6):
        store.save(state_of(step), step)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_only_what_the_index_names_was_deleted_from(tmp_path: Path) -> None:
    bystander = tmp_path / "step-backup.pt"
    bystander.write_bytes(b"mine")
    store = CheckpointStore(tmp_path)
    for step in range(1, 5):
        store.save(state_of(step), step)
    assert bystander.read_bytes() == b"mine"
    names = [row["file"] for row in json.loads((tmp_path / INDEX).read_text())["checkpoints"]]
    assert names == ["step-00000003.pt", "step-00000004.pt"]


def test_nothing_is_deleted_before_the_index_has_stopped_naming_it(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", stopped)
        with pytest.raises(KeyboardInterrupt):
            CheckpointStore(two_saved).save(state_of(30), 30)
    store, warnings = store_in(two_saved)
    assert steps_in(two_saved) == [10, 20, 30]
    assert store.load("last")[0] == 20
    assert warnings == []


def test_there_is_no_best_without_validation(two_saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"use last, or train with --set data\.validation=N"):
        CheckpointStore(two_saved).load("best")
    for which in ("last", "best"):
        with pytest.raises(DataError, match="holds no checkpoint"):
            CheckpointStore(tmp_path / "nothing").load(which)
    assert not (tmp_path / "nothing").exists(), "reading makes no folder"


# ---- full disks


@pytest.mark.parametrize("room", [0, 100, 15_000, 22_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary_file(
    two_saved: Path, room: int
) -> None:
    store = CheckpointStore(two_saved)
    assert (two_saved / "step-00000020.pt").stat().st_size > 22_000
    before = {name: (two_saved / name).read_bytes() for name in files_in(two_saved)}
    with (
        files_limited_to(room),
        pytest.raises(EgtrainError, match=r"step-00000030\.pt.*\d+ bytes are free") as caught,
    ):
        store.save(state_of(30), 30)
    assert caught.value.exit_code == 1
    assert "free some space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {name: (two_saved / name).read_bytes() for name in files_in(two_saved)} == before
    store.save(state_of(30), 30)
    assert store.load("last")[0] == 30


def test_a_disk_that_cannot_sync_counts_as_full(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(EgtrainError, match="No space left on device"):
            CheckpointStore(two_saved).save(state_of(30), 30)
    assert CheckpointStore(two_saved).load("last")[0] == 20
    assert files_in(two_saved) == [INDEX, "step-00000010.pt", "step-00000020.pt"]


def test_a_really_full_file_system_is_survived(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    try:
        store = CheckpointStore(tmp_path)
        store.save(state_of(10), 10)
        with pytest.raises(EgtrainError, match="No space left on device"):
            store.save(state_of(20, size=100_000), 20)
        assert files_in(tmp_path) == [INDEX, "step-00000010.pt"]
        assert equal(store.load("last")[1], state_of(10))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EgtrainError, match="make the folder writable"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(state_of(1), 1)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")
    with files_limited_to(100), pytest.raises(EgtrainError, match=r"config\.yaml"):
        write_atomically(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["config.yaml"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
