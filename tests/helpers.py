"""Small runs of the real program: in this process, in forked ones, and as a user starts them."""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from egtrain import build, session
from egtrain.__main__ import main
from egtrain.checkpoint import read_checkpoint
from egtrain.config.extrapolations import SECTIONS
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.ranks import signals
from egtrain.run_directory import CONFIG, RunDirectory
from egtrain.tasks import Split
from egtrain.tasks.image import ImageTask

ROOT = Path(__file__).parents[1]
STEPS_PER_EPOCH = 4
STEPS = 12
NEEDS = {
    "extragradient": ["extrapolation.samples=new"],
    "gaussian": ["extrapolation.size=0.05"],
    "smoothout": ["extrapolation.size=0.05"],
    "msam": ["optimizer.nesterov=false", "extrapolation.after_warmup=false"],
    "nesterov": ["optimizer.nesterov=false"],
}
EXTRAPOLATIONS = {name: NEEDS.get(name, []) for name in SECTIONS}
"""Every choice of ζ with the settings that it needs."""


def write_images(path: Path, *, train: int = 150, test: int = 1100, size: int = 8) -> Path:
    """Write an .npz file of small coloured images, whose class is where they are bright."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 4
        images = generator.integers(0, 160, (count, size, size, 3))
        rows, columns = np.divmod(labels, 2)
        for image, row, column in zip(images, rows, columns, strict=True):
            image[row * size // 2 :, column * size // 2 :] += 60
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)
    return path


def settings(data: Path, *further: str, deterministic: bool = True) -> list[str]:
    """Return settings, for `--set` or `load_config`, of a run of a second: K = 4, b = 8, 12 steps,
    4 an epoch.

    Whatever the tests count on is here, so that a preset can change.
    """
    return [
        f'data.name="npz:{data}"',
        "workers=4",
        "worker_batch_size=8",
        "model.depth=8",
        "model.width=4",
        "epochs=3",
        "evaluate_every=1",
        "schedule.warmup_epochs=1",
        "schedule.shorten_warmup=true",
        "schedule.warmup_from=0.1",
        "schedule.decay=cosine",
        "optimizer.lr=0.1",
        "optimizer.base_batch_size=null",
        "precision=fp32",
        "device=cpu",
        "threads=1",
        "log.tensorboard=false",
        f"deterministic={str(deterministic).lower()}",
        *further,
    ]


def config_of(
    data: Path, *further: str, extrapolation: str = "local", deterministic: bool = True
) -> Config:
    """Return the configuration of such a run."""
    name = [f"extrapolation.name={extrapolation}", *EXTRAPOLATIONS[extrapolation]]
    return load_config("quickstart", settings(data, *name, *further, deterministic=deterministic))


def arguments(
    data: Path, *further: str, extrapolation: str = "local", deterministic: bool = True
) -> list[str]:
    """Return the command line of such a run, without a directory."""
    name = [f"extrapolation.name={extrapolation}", *EXTRAPOLATIONS[extrapolation]]
    pairs = settings(data, *name, *further, deterministic=deterministic)
    return [
        "train",
        "--preset",
        "quickstart",
        *[part for pair in pairs for part in ("--set", pair)],
    ]


class StopAfter(signals.StopSignal):
    """A stop signal that comes in the n-th step of this process."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps_left = steps

    def __call__(self) -> bool:
        """Return whether that step has come."""
        self._steps_left -= 1
        return self._steps_left == 0


@contextlib.contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Undo what a run sets for its whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    cudnn: Any = torch.backends.cudnn
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def run_here(
    directory: Path, config: Config, *, resume: bool = False, stop_after: int | None = None
) -> Path:
    """Train in this process, to the end or until the n-th step; return the directory."""
    original = signals.StopSignal
    with torch_as_it_was():
        try:
            if stop_after is not None:
                signals.StopSignal = lambda: StopAfter(stop_after)  # type: ignore[assignment, misc]
            before = (directory / CONFIG).read_bytes() if resume else None
            session.train_in(RunDirectory(directory, goes_on_from=before), config)
        finally:
            signals.StopSignal = original  # type: ignore[misc]
    return directory


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int | str | None
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The error message; anything beside it is a failure."""
        (line,) = self.stderr.splitlines()
        assert line.startswith("egtrain: ")
        return line.removeprefix("egtrain: ")


def command_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    """Run the command line in this process."""
    capsys.readouterr()
    before = sys.argv
    with torch_as_it_was():
        try:
            sys.argv = ["egtrain", *arguments]
            main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def metrics_in(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall"} for line in lines]


def write_texts(folder: Path, words: int, pairs: int) -> None:
    """Write train.txt, valid.txt and test.txt, and the same as sentence pairs in `en` and `de`."""
    drawn = random.Random(0)
    say = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
    for part, share in (("train", 1.0), ("valid", 0.3), ("test", 0.3)):
        line = [drawn.choice(say) for _ in range(round(words * share))]
        (folder / f"{part}.txt").write_text(
            "".join(" ".join(line[i : i + 9]) + "\n" for i in range(0, len(line), 9))
        )
        sentences = [drawn.choices(say, k=drawn.randint(2, 7)) for _ in range(round(pairs * share))]
        (folder / f"{part}.en").write_text("".join(" ".join(words) + ".\n" for words in sentences))
        (folder / f"{part}.de").write_text(
            "".join(" ".join(reversed(words)).upper() + ".\n" for words in sentences)
        )


def newest_checkpoint(directory: Path) -> Path:
    """Return the file of the latest step."""
    return max((directory / "checkpoints").glob("step-*.pt"))


def flattened(value: Any, name: str = "state") -> dict[str, Any]:
    """Return the leaves of nested dicts, lists and tuples by name."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        return {name: value}
    leaves: dict[str, Any] = {f"{name} size": len(pairs)}
    for key, inner in pairs:
        leaves |= flattened(inner, f"{name}.{key}")
    return leaves


def digest(tensor: Tensor) -> str:
    """Return type, shape and SHA-256 of a tensor."""
    data = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {list(tensor.shape)} {data}"


def outcome(directory: Path) -> dict[str, Any]:
    """Return what equal runs share: every tensor of the newest checkpoint, and the metrics."""
    step, state = read_checkpoint(newest_checkpoint(directory))
    leaves = {
        name: digest(leaf) if isinstance(leaf, Tensor) else leaf
        for name, leaf in flattened(state).items()
    }
    return {"step": step, **leaves, "metrics": metrics_in(directory)}


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**further: str) -> dict[str, str]:
    """Return the environment of a process that finds egtrain and nothing of the user's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("EGTRAIN_DATA", "EGTRAIN_TEST_FAULT")
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "COLUMNS": "200", **further}


@functools.cache
def fork_server() -> ForkServerContext:
    """Return the context that forks processes from one that has only imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch._inductor",
            "pytest",
            "egtrain.session",
            "egtrain.cli",
            "egtrain.saved_run",
            "helpers",
        ]
    )
    before = dict(os.environ)
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Forked:
    """The command line in a new process, forked from one that has imported torch already.

    Exit codes, signals and kills are those of a process that a user starts; only the import is
    saved.

    Args:
        arguments: what stands after `egtrain`.
        folder: the working directory, and where the output goes.
        further: environment variables, over those of `environment`.
        before: is called in the process first, for example to break something in it.
    """

    count = 0

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        further: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        Forked.count += 1
        self._temporary = Path(further["TMPDIR"]) if further and "TMPDIR" in further else None
        self._files = [folder / f"{stream}-{Forked.count}.txt" for stream in ("stdout", "stderr")]
        everything = environment(**(further or {}))
        self._process = fork_server().Process(
            target=_run_command_line,
            args=(arguments, str(folder), everything, list(map(str, self._files)), before),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        if self._temporary is not None:
            kill_all(processes_of(self._temporary))

    def wait(self, seconds: float = 60) -> int:
        """Return the exit code, negative for a signal; a process that hangs is a failure."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise AssertionError(
                f"still running after {seconds} s; its output:\n{self.stdout}\n{self.stderr}"
            )
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    @property
    def stderr(self) -> str:
        """What it has printed to standard error."""
        return self._files[1].read_text() if self._files[1].exists() else ""


def _run_command_line(
    arguments: list[str],
    folder: str,
    everything: dict[str, str],
    files: list[str],
    before: Callable[[], None] | None,
) -> None:
    for stream, file in zip((1, 2), files, strict=True):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    heed_signals()
    os.environ.clear()
    os.environ.update(everything)
    tempfile.tempdir = None  # the server has found its own
    os.chdir(folder)
    sys.argv = ["egtrain", *arguments]
    code: int | None = 1
    try:
        if before is not None:
            before()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


@contextlib.contextmanager
def forked_ranks(
    arguments: list[str],
    folder: Path,
    count: int,
    before: Callable[[], None] | None = None,
    further: dict[str, str] | None = None,
) -> Iterator[list[Forked]]:
    """Start ranks with torchrun's variables; rank 0 holds the store unless `further` names one."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **(further or {})}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Forked(arguments, folder, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, before)
            )
            for r in range(count)
        ]


def run_on_ranks(arguments: list[str], folder: Path, count: int) -> list[Forked]:
    """Run to the end on forked ranks and return them; every one must succeed."""
    with forked_ranks(arguments, folder, count) as ranks:
        codes = [rank.wait() for rank in ranks]
    assert codes == [0] * count, "\n".join(rank.stderr for rank in ranks)
    return ranks


def on_two_ranks(function: Callable[[], Any], folder: Path) -> list[Any]:
    """Call a function in two processes with torchrun's variables and return both results."""
    with forked_ranks(
        [], folder, 2, before=functools.partial(save_result, function, folder)
    ) as ranks:
        codes = [rank.wait(120) for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.stderr for rank in ranks)
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(2)]


def save_result(function: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(function(), folder / f"result-{os.environ['RANK']}.pt")
    os._exit(0)  # see process_group


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Make a process group, which lasts until the process ends.

    Where gloo's is destroyed, or Python ends in order, a process may wait for itself for ever
    (torch 2.13, with DistributedDataParallel, once in a few tries).
    """
    dist.init_process_group("gloo")
    yield


def heed_signals() -> None:
    """Let this process be interrupted, even if a script started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def started(command: list[str], folder: Path, **further: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a real command, and end all its processes even if the test fails."""
    # Its temporary files lie in the folder, where the process numbers of ranks are found.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | {"TMPDIR": str(folder), **further},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    try:
        yield process
    finally:
        kill_all([process.pid, *processes_of(folder)])
        process.communicate()


def kill_all(processes: list[int]) -> None:
    """Leave none of them."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """Return the processes whose temporary files are in the folder."""
    wanted = f"TMPDIR={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until the condition holds and return its value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.005)
    raise AssertionError(f"waited {seconds} s in vain")


def steps_logged(directory: Path) -> int:
    """Return the last step in metrics.jsonl so far."""
    file = directory / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def kill() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Ask this process to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def spoil() -> float:
    """Return the factor that makes a loss not a number."""
    return math.nan


@dataclass(frozen=True)
class Fault:
    """Makes something happen at an exact point of a run; called in a forked process first."""

    act: Callable[[], object]
    """If it returns a number, the loss is multiplied by it."""
    step: int = 0
    """Completed updates before the point."""
    worker: int = 0
    """The point is this worker's forward pass, at the shifted weights."""
    in_evaluation: bool = False
    """The point is the first batch of the evaluation after `step`, not a step's forward pass."""
    in_data: bool = False
    """The point is the loading of the data."""
    rank: int | None = None
    """The rank that it happens on; None: every rank."""

    def __call__(self) -> None:
        """Put it in place, for the rest of the process."""
        if self.rank is not None and os.environ.get("RANK") != str(self.rank):
            return
        task = ImageTask
        batch, loss, evaluate, load = task.batch, task.loss, task.evaluate_batch, build.load_images
        at = [(-1, -1)]

        def noted_batch(self: ImageTask, worker: int, step: int) -> Any:
            at[0] = (worker, step)
            return batch(self, worker, step)

        def broken_loss(task: ImageTask, model: nn.Module, samples: Any) -> Any:
            value, metric = loss(task, model, samples)
            if not self.in_evaluation and not self.in_data and at[0] == (self.worker, self.step):
                factor = self.act()
                value = value * factor if isinstance(factor, float) else value
            return value, metric

        def broken_evaluation(
            task: ImageTask, model: nn.Module, split: Split, index: int
        ) -> Tensor:
            if self.in_evaluation and at[0][1] + 1 >= self.step and index == 0:
                self.act()
            return evaluate(task, model, split, index)

        def broken_load(*values: Any, **named: Any) -> Any:
            if self.in_data:
                self.act()
            return load(*values, **named)

        task.batch, task.loss, task.evaluate_batch = noted_batch, broken_loss, broken_evaluation  # type: ignore[method-assign]
        build.load_images = broken_load


@dataclass(frozen=True)
class Stop:
    """Asks one rank to stop in its n-th step; called in a forked process first."""

    after: int
    rank: int = 0

    def __call__(self) -> None:
        """Put it in place, for the rest of the process."""
        if os.environ.get("RANK", "0") == str(self.rank):
            signals.StopSignal = functools.partial(StopAfter, self.after)  # type: ignore[assignment, misc]
