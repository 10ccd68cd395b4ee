"""K is the algorithm, R is only how it is run; and what happens to one rank happens to the run."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    Fault,
    Forked,
    Stop,
    arguments,
    config_of,
    digest,
    flattened,
    forked_ranks,
    free_port,
    kill,
    kill_all,
    metrics_in,
    newest_checkpoint,
    outcome,
    processes_of,
    run_here,
    run_on_ranks,
    spoil,
    started,
    steps_logged,
    terminate,
    wait_until,
)
from torch import Tensor
from torch.distributed import TCPStore

from egtrain import session
from egtrain.checkpoint import read_checkpoint
from egtrain.errors import DataError, UsageError
from egtrain.ranks import launch
from egtrain.ranks.torchrun import OUTCOMES
from egtrain.run_directory import RunLock

pytestmark = pytest.mark.timeout(180)
Undisturbed = Callable[..., dict[str, Any]]

LONG = ["steps=80", "evaluate_every=10", "checkpoint.every=4"]
"""Settings of a run that is long enough to be disturbed from outside."""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("extrapolation", ["local", "gradient-noise"])
def test_any_number_of_ranks_gives_the_same_run_bit_for_bit(
    extrapolation: str, ranks: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_on_ranks(
        [*arguments(images, extrapolation=extrapolation), "--output", "run"], tmp_path, ranks
    )
    assert outcome(tmp_path / "run") == undisturbed(extrapolation=extrapolation)
    assert json.loads((tmp_path / "run/summary.json").read_text())["ranks"] == ranks


@pytest.mark.parametrize(
    ("ranks", "further"),
    [(2, ()), (4, ()), (2, ("post_local.period=3", "post_local.start=0.334"))],
    ids=["2", "4", "2, with a local phase"],
)
def test_without_deterministic_ranks_agree_up_to_rounding(
    ranks: int, further: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    alone = run_here(tmp_path / "alone", config_of(images, *further, deterministic=False))
    run_on_ranks(
        [*arguments(images, *further, deterministic=False), "--output", "run"], tmp_path, ranks
    )

    for found, expected in zip(
        *(compared(directory) for directory in (tmp_path / "run", alone)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def compared(directory: Path) -> list[dict[str, Any]]:
    """Return the state and the lines of metrics, without text and a difference of nearly equal
    numbers over another.
    """
    parts = [flattened(read_checkpoint(newest_checkpoint(directory))[1]), *metrics_in(directory)]
    left_out = (
        "noise_scale",
        "state.noise_scale.noise_trace",
        "state.noise_scale.squared_gradient",
    )
    return [
        {
            name: value
            for name, value in part.items()
            if name not in left_out and isinstance(value, Tensor | float | int)
        }
        for part in parts
    ]


@dataclass(frozen=True)
class NotesStates:
    """Makes each rank write down how many numbers of the workers it was given to save."""

    folder: Path

    def __call__(self) -> None:
        """Put it in place, for the rest of the process."""
        recorder = session.Recorder if os.environ["RANK"] == "0" else session.NoRecorder
        save = recorder.save

        def noted(self_: Any, run: Any, state: dict[str, Any], validation: Any) -> None:
            parts = {
                "extrapolation": state["extrapolation"]["worker_state"],
                "buffers": state["workers"]["buffers"],
                "weights": state["workers"]["parameters"],
                "post_local": state["post_local"],
            }
            held = {
                name: sum(
                    leaf.numel() for leaf in flattened(part).values() if isinstance(leaf, Tensor)
                )
                for name, part in parts.items()
            }
            (self.folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))
            save(self_, run, state, validation)

        recorder.save = noted  # type: ignore[method-assign]


def test_only_the_rank_that_writes_gathers_the_state_of_all_workers(
    images: Path, tmp_path: Path
) -> None:
    command = [*arguments(images, "post_local.period=3", "post_local.start=0.334")]
    with forked_ranks([*command, "--output", "run"], tmp_path, 2, NotesStates(tmp_path)) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    writer, other = (json.loads((tmp_path / f"held-{rank}.json").read_text()) for rank in (0, 1))
    assert all(numbers > 0 for numbers in writer.values()), writer
    assert all(numbers == 0 for numbers in other.values()), other


def test_a_run_saved_on_two_ranks_goes_on_on_one(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with forked_ranks(
        [*arguments(images), "--output", "run"], tmp_path, 2, Stop(after=6, rank=1)
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
        assert (
            ranks[0].stderr == "egtrain: interrupted after step 6; a checkpoint was saved; "
            "go on with --resume run\n"
        )
        assert ranks[1].stderr == ""
    assert outcome(tmp_path / "run")["step"] == 6
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_run_saved_on_one_rank_goes_on_on_two(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="interrupted after step 6"):
        run_here(tmp_path / "run", config_of(images), stop_after=6)
    run_on_ranks(["train", "--resume", "run"], tmp_path, 2)
    assert outcome(tmp_path / "run") == undisturbed()


@pytest.mark.slow
def test_nproc_goes_on_after_a_rank_was_killed(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    when = random.Random(5).randrange(5, 40)
    with launched(
        [*arguments(images, *LONG), "--output", "run", "--json", "--max-restarts", "1"], tmp_path
    ) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") >= when, 120)
        (note,) = tmp_path.glob("egtrain-*/rank-1")
        os.kill(int(note.read_text()), signal.SIGKILL)
        assert process.wait(150) == 0, process.stderr
    assert json.loads(process.stdout)["steps"] == 80
    assert "run: from step " in process.stderr
    assert outcome(tmp_path / "run") == undisturbed(*LONG)


@pytest.mark.slow
def test_a_signal_to_nproc_saves_on_all_ranks_and_leaves_no_process(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with launched([*arguments(images, *LONG), "--output", "run"], tmp_path) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") >= 3, 120)
        process.send(signal.SIGTERM)
        assert process.wait(120) == 75, process.stderr
        assert processes_of(tmp_path) == []
    step = outcome(tmp_path / "run")["step"]
    assert (
        process.stderr == f"egtrain: interrupted after step {step}; a checkpoint was saved; "
        "go on with --resume run\n"
    )
    assert list(tmp_path.glob("egtrain-*")) == []
    run_here(tmp_path / "run", config_of(images, *LONG), resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*LONG)


@pytest.mark.slow
def test_plain_torchrun_agrees_on_a_directory_and_an_interrupted_rank_succeeds(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*torchrun, "--max-restarts", "1", "-m", "egtrain", *arguments(images, *LONG)]
    with started(command, tmp_path) as process:
        (directory,) = wait_until(lambda: list(tmp_path.glob("runs/*")), 120)
        wait_until(lambda: steps_logged(directory) >= 3)
        (rank,) = [pid for pid in processes_of(tmp_path) if variable_of(pid, "RANK") == "1"]
        os.kill(rank, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert processes_of(tmp_path) == []
    step = outcome(directory)["step"]
    assert f"egtrain: interrupted after step {step}; a checkpoint was saved" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.glob("runs/*")) == [directory]
    run_here(directory, config_of(images, *LONG), resume=True)
    assert outcome(directory) == undisturbed(*LONG)


@pytest.mark.slow
def test_an_expected_failure_under_nproc_is_one_line_and_its_own_code(tmp_path: Path) -> None:
    missing = arguments(tmp_path / "missing.npz")
    with launched([*missing, "--output", "run", "--max-restarts", "3"], tmp_path) as process:
        assert process.wait(120) == 3, process.stderr
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"egtrain: {tmp_path}/missing.npz: no such file or folder, here or in ")
    assert line.endswith("; give the path of an .npz file, as in --data npz:images.npz")
    # Nothing was trained, so nothing is left.
    assert not (tmp_path / "run").exists()


TORCHRUN = """#!{python} -IS
# Stands in for torchrun and two ranks, without the seconds that torch takes.
import os, pathlib, signal, time
notes = pathlib.Path(os.environ["EGTRAIN_OUTCOMES"])
def start_ranks(rank):
    torchrun = os.getpid()
    for number in 0, 1:
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (notes / f"rank-{{number}}").write_text(str(os.getpid()))
            rank(torchrun)
            os._exit(0)
    while len(list(notes.glob("rank-*"))) < 2:
        time.sleep(0.01)
def save_once_alone(torchrun):
    while os.getppid() == torchrun:
        time.sleep(0.01)
    time.sleep(0.5)
    (notes / "exit").write_text("75")
{what}
"""
STOPPED_AT_START = """
while not (notes / 'stop').exists(): time.sleep(0.01)
(notes / 'exit').write_text('75')
"""


@pytest.mark.parametrize(
    ("what", "signals", "code"),
    [
        # The ranks are not ready yet: they will find that they were asked to stop.
        (STOPPED_AT_START, [signal.SIGTERM], 75),
        (STOPPED_AT_START, [signal.SIGINT], 75),
        (STOPPED_AT_START, [signal.SIGHUP], 75),
        ("start_ranks(save_once_alone)\nos.kill(os.getpid(), 9)", [], 75),
        (
            "start_ranks(lambda _: time.sleep(60))\nos.wait()",
            [signal.SIGHUP, signal.SIGTERM],
            128 + signal.SIGTERM,
        ),
        ("(notes / 'exit').write_text('4')", [], 4),
        ("os._exit(1)", [], 1),
        ("os.kill(os.getpid(), 9)", [], 1),
        ("", [], 0),
    ],
    ids=[
        "SIGTERM at the start",
        "Ctrl-C at the start",
        "SIGHUP at the start",
        "torchrun killed",
        "second signal",
        "noted",
        "failed",
        "killed alone",
        "done",
    ],
)
def test_the_launcher_returns_the_code_of_the_run_and_leaves_no_process(
    what: str, signals: list[int], code: int, images: Path, tmp_path: Path
) -> None:
    with launched(
        [*arguments(images), "--output", "run"], tmp_path, stub_of_torchrun(tmp_path, what)
    ) as process:
        for number in signals:
            wait_until(lambda: any(tmp_path.glob("egtrain-*/launcher")))
            time.sleep(2.2 if len(signals) == 2 else 0.2)
            process.send(number)
        assert process.wait(30) == code
        assert wait_until(lambda: processes_of(tmp_path) == [], 5)
    assert list(tmp_path.glob("egtrain-*")) == []


def ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_launcher_under_nohup_outlives_its_terminal(images: Path, tmp_path: Path) -> None:
    what = "time.sleep(1)\n(notes / 'exit').write_text('75' if (notes / 'stop').exists() else '0')"
    stub = stub_of_torchrun(tmp_path, what)
    with launched(
        [*arguments(images), "--output", "run"], tmp_path, InTurn(ignore_hangups, stub)
    ) as process:
        wait_until(lambda: any(tmp_path.glob("egtrain-*/launcher")))
        time.sleep(0.2)
        process.send(signal.SIGHUP)
        assert process.wait(30) == 0


@pytest.mark.parametrize("launcher_killed", [False, True])
def test_of_two_starts_at_once_the_second_is_refused_and_changes_nothing(
    launcher_killed: bool, images: Path, tmp_path: Path
) -> None:
    """The ranks of the first take their seconds to start, or to save after their launcher died."""
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    before = outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()
    stub = stub_of_torchrun(tmp_path, "start_ranks(lambda _: time.sleep(60))\nos.wait()")
    resume = ["train", "--resume", "run"]
    with launched(resume, tmp_path, stub) as first:
        ranks = wait_until(lambda: noted_ranks(tmp_path))
        if launcher_killed:
            kill_all([first.pid])
            kill_all([pid for pid in processes_of(tmp_path) if pid not in ranks])
        changed = [*resume, "--steps", "3", "--set", "optimizer.lr=0.05", "--allow-changes"]
        for further in ([], ["--nproc", "2"]):
            with Forked([*changed, *further], tmp_path) as second:
                assert second.wait() == 2
            assert second.stderr.splitlines()[-1].startswith(
                f"egtrain: another run (process {first.pid}) is writing to run: wait for it to end"
            )
    assert (outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()) == before


def noted_ranks(folder: Path) -> list[int] | None:
    """Return the process numbers of two ranks, once both have noted theirs."""
    notes = [note.read_text() for note in folder.glob("egtrain-*/rank-*")]
    return [int(pid) for pid in notes] if len(notes) == 2 and all(notes) else None


@dataclass(frozen=True)
class UseAsPython:
    path: str

    def __call__(self) -> None:
        sys.executable = self.path


def stub_of_torchrun(folder: Path, what: str) -> UseAsPython:
    """Return a function that replaces torchrun with a stub that does `what`."""
    stub = folder / "torchrun"
    stub.write_text(TORCHRUN.format(python=sys.executable, what=what))
    stub.chmod(0o755)
    return UseAsPython(str(stub))


@dataclass(frozen=True)
class InTurn:
    """Several things to be done in a forked process before its command line."""

    first: Callable[[], None]
    second: Callable[[], None]

    def __call__(self) -> None:
        self.first()
        self.second()


def launched(command: list[str], folder: Path, before: Callable[[], None] | None = None) -> Forked:
    """Return the launcher of two ranks; its temporary files, with the ranks' process numbers, lie
    in the folder.
    """
    return Forked([*command, "--nproc", "2"], folder, {"TMPDIR": str(folder)}, before)


def variable_of(pid: int, name: str) -> str | None:
    """Return an environment variable of another process."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((pair.partition("=")[2] for pair in pairs if pair.startswith(f"{name}=")), None)


def notes_of_launcher(folder: Path, pid: int, stop: bool = False) -> Path:
    notes = folder / "notes"
    notes.mkdir()
    (notes / "launcher").write_text(str(pid))
    if stop:
        (notes / "stop").touch()
    return notes


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("killed", [True, False])
def test_ranks_save_and_leave_when_their_launcher_died_or_had_left_word(
    killed: bool,
    images: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = notes_of_launcher(tmp_path, dead_process() if killed else os.getpid(), stop=not killed)
    monkeypatch.setenv(OUTCOMES, str(notes))
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert (notes / "exit").read_text() == "75"
    assert outcome(tmp_path / "run")["step"] == 1
    monkeypatch.delenv(OUTCOMES)
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_signal_to_one_rank_during_the_start_is_not_lost(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fault = Fault(terminate, in_data=True, rank=1)
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, fault) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert outcome(tmp_path / "run")["step"] == 1
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def fail_to_read() -> None:
    raise DataError("this machine cannot read them: mount the disk")


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (
            Fault(fail_to_read, in_data=True, rank=1),
            3,
            "rank 1: this machine cannot read them: mount the disk",
        ),
        (
            Fault(fail_to_read, in_data=True, rank=0),
            3,
            "this machine cannot read them: mount the disk",
        ),
        (
            Fault(small_files_only, step=1, rank=0),
            1,
            "cannot write run/checkpoints/step-00000004.pt: File too large",
        ),
        (
            Fault(spoil, step=2, worker=3),
            4,
            "the loss of worker 3 became nan at step 3: lower optimizer.lr",
        ),
    ],
    ids=["data on rank 1", "data on rank 0", "disk full", "not a number"],
)
def test_what_fails_on_one_rank_fails_on_all_in_one_line(
    fault: Fault, code: int, message: str, images: Path, tmp_path: Path
) -> None:
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, fault) as ranks:
        assert [rank.wait() for rank in ranks] == [code, code], ranks[1].stderr
    printed = [
        [line for line in rank.stderr.splitlines() if not line.startswith("warning: ")]
        for rank in ranks
    ]
    (line,) = printed.pop(1 if message.startswith("rank 1: ") else 0)
    assert line.startswith(f"egtrain: {message}")
    assert printed == [[]]


def fail_unexpectedly() -> None:
    raise ZeroDivisionError("nobody has thought of this")


@dataclass(frozen=True)
class HangOnRank0:
    """Lets rank 0 hang in the step in which rank 1 fails; NCCL hangs so when a rank is lost."""

    fault: Fault

    def __call__(self) -> None:
        Fault(partial(time.sleep, 100), step=2, rank=0)()
        self.fault()


@pytest.mark.parametrize("first_rank_hangs", [False, True])
@pytest.mark.parametrize("expected", [True, False])
def test_what_fails_on_one_rank_alone_is_told_by_it_and_ends_the_others_within_seconds(
    expected: bool, first_rank_hangs: bool, images: Path, tmp_path: Path
) -> None:
    fault = Fault(fail_to_read if expected else fail_unexpectedly, step=2, worker=2, rank=1)
    before = HangOnRank0(fault) if first_rank_hangs else fault
    with (
        torchruns_store() as agent,
        forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, before, agent) as ranks,
    ):
        wait_until(lambda: steps_logged(tmp_path / "run") == 2)
        code = 3 if expected else 1
        assert [rank.wait(10) for rank in ranks] == [code, code], ranks[0].stderr
    assert ranks[0].stderr == ""
    lines = ranks[1].stderr.splitlines()
    if expected:
        assert lines == ["egtrain: rank 1: this machine cannot read them: mount the disk"]
    else:
        assert lines[0] == "egtrain: rank 1: an unexpected failure"
        assert ranks[1].stderr.count("Traceback") == 1
        assert lines[-1].endswith("ZeroDivisionError: nobody has thought of this")


def test_one_failing_rank_gives_the_launcher_its_code_and_is_restarted_only_if_unexpected(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = notes_of_launcher(tmp_path, os.getpid())
    monkeypatch.setenv(OUTCOMES, str(notes))
    for act, codes, noted in (
        (fail_unexpectedly, [1, 1], None),  # torchrun restarts these
        (fail_to_read, [0, 0], "3"),
    ):
        output = f"run-{noted}"
        fault = Fault(act, step=2, worker=2, rank=1)
        with (
            torchruns_store() as agent,
            forked_ranks([*arguments(images), "--output", output], tmp_path, 2, fault, agent) as r,
        ):
            assert [rank.wait() for rank in r] == codes, r[0].stderr
        file = notes / "exit"
        assert (file.read_text() if file.exists() else None) == noted


def test_ranks_that_do_not_share_a_folder_do_not_go_on_from_different_steps(
    images: Path, tmp_path: Path
) -> None:
    for node in (0, 1):
        (tmp_path / f"node-{node}").mkdir()
        run_here(tmp_path / f"node-{node}/run", config_of(images, f"steps={4 - 2 * node}"))
    resume = ["train", "--resume", "run", "--steps", "6", "--allow-changes"]
    with torchruns_store() as agent, contextlib.ExitStack() as stack:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", **agent}
        ranks = [
            stack.enter_context(
                Forked(resume, tmp_path / f"node-{node}", {**shared, "RANK": str(node)})
            )
            for node in (0, 1)
        ]
        assert [rank.wait() for rank in ranks] == [2, 2]
    assert "egtrain: " not in ranks[0].stderr
    assert ranks[1].stderr.splitlines()[-1] == (
        "egtrain: rank 1: the newest checkpoint in run is of step 2 here and of step 4 on rank 0: "
        "put the run into a folder that all nodes share"
    )
    assert outcome(tmp_path / "node-0/run")["step"] == 4


@contextlib.contextmanager
def torchruns_store() -> Iterator[dict[str, str]]:
    """Hold the store that outlives the ranks, as torchrun does; return the variables naming it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextlib.contextmanager
def two_nodes(command: list[str], folders: list[Path]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start a command as the page starts it on two nodes: on this machine, a rank each."""
    printed = [
        line.partition(" -m egtrain ")[0]
        for line in (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("torchrun --nnodes 2 ")
    ]
    assert len(printed) == len(set(printed)) == 2
    here = {
        "torchrun": f"{sys.executable} -m torch.distributed.run",
        "--nproc-per-node 8": "--nproc-per-node 1",
        "node0": "127.0.0.1",
        "29500": str(free_port()),
    }
    for there, changed in here.items():
        printed = [line.replace(there, changed) for line in printed]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started([*line.split(), "-m", "egtrain", *command], folder))
            for line, folder in zip(printed, folders, strict=True)
        ]


@pytest.mark.slow
def test_two_nodes_that_share_a_folder_give_the_run_of_one_process(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with two_nodes(arguments(images), [tmp_path, tmp_path]) as nodes:
        ends = [node.communicate(timeout=120) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], ends
    (directory,) = tmp_path.glob("runs/*")
    assert outcome(directory) == undisturbed()


@pytest.mark.slow
def test_a_node_that_lacks_the_run_says_so_and_ends_the_other_within_seconds(
    images: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    run_here(folders[0] / "run", config_of(images, "steps=2"))
    resume = ["train", "--resume", "run", "--steps", "2000", "--allow-changes"]
    with two_nodes(resume, folders) as nodes:
        stderr = [node.communicate(timeout=60)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [1, 1]  # torchrun's code for every failure
    assert "egtrain: " not in stderr[0]
    assert stderr[1].count("egtrain: rank 1: run holds no run: there is no config.yaml; ") == 1


def test_a_directory_in_use_is_refused_on_all_ranks(images: Path, tmp_path: Path) -> None:
    with (
        RunLock(tmp_path / "run"),
        forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2) as ranks,
    ):
        assert [rank.wait() for rank in ranks] == [2, 2]
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith(f"egtrain: another run (process {os.getpid()}) is writing to run: ")
    assert ranks[1].stderr == ""


def test_a_restarted_run_does_not_take_over_the_directory_of_another(
    images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "seed=1"))
    before = outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    with forked_ranks(
        [*arguments(images), "--output", "run"], tmp_path, 2, None, restarted
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2]
    assert "holds a run already" in ranks[0].stderr
    assert (outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()) == before


def test_ranks_that_are_restarted_go_on_in_the_directory_that_they_had_made(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The user did not name it, and its name holds the time of the first start."""
    with torchruns_store() as agent:
        with forked_ranks(arguments(images), tmp_path, 2, Fault(kill, step=6), agent) as ranks:
            assert ranks[0].wait() == -signal.SIGKILL
        (directory,) = tmp_path.glob("runs/*")
        time.sleep(1)
        restarted = {**agent, "TORCHELASTIC_RESTART_COUNT": "1"}
        with forked_ranks(arguments(images), tmp_path, 2, None, restarted) as ranks:
            assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert list(tmp_path.glob("runs/*")) == [directory]
    assert ": from step 4, " in ranks[0].stdout
    assert outcome(directory) == undisturbed()


@pytest.mark.parametrize(
    ("workers", "ranks", "possible"), [(4, 3, "1, 2, 4"), (12, 0, "1, 2, 3, 4, 6, 12")]
)
def test_ranks_that_do_not_divide_the_workers_are_refused_with_those_that_do(
    workers: int, ranks: int, possible: str
) -> None:
    with pytest.raises(UsageError, match=f"use --nproc {possible}$"):
        launch.require_dividing(workers, ranks)


def test_torchrun_with_ranks_that_do_not_divide_the_workers_is_refused(
    images: Path, tmp_path: Path
) -> None:
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 3) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2, 2]
    assert (
        ranks[0].stderr == "egtrain: 4 workers cannot be shared by 3 ranks: run on 1, 2, 4 ranks\n"
    )


def test_two_equal_tensors_have_one_digest_and_others_another() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.t().contiguous().t())
    assert (
        len(
            {
                digest(x),
                digest(x.double()),
                digest(x.view(3, 2)),
                digest(x + 1e-6),
                digest(-x * -1 + 0.0),
            }
        )
        == 4
    )
