"""A task file: its samples are the same whoever fetches them, and every command takes it."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Forked,
    command_line,
    metrics_in,
    outcome,
    run_here,
    run_on_ranks,
    steps_logged,
    torch_as_it_was,
    wait_until,
)
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import egtrain
from egtrain.build import build_run
from egtrain.checkpoint import read_checkpoint
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.data.user import UserData
from egtrain.errors import UsageError
from egtrain.optim.randomness import generator_for, seed_for
from egtrain.ranks.torchrun import is_alive
from egtrain.run import Run
from egtrain.run_directory import RunLock
from egtrain.task_file import TaskFile, load_task_file
from egtrain.tasks.loading import on_device, set_random_state
from egtrain.train import take_step
from egtrain.workers import Ranks

pytestmark = pytest.mark.timeout(180)

FLOWERS = '''
"""Small images, fetched one at a time and augmented with all three kinds of randomness."""
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset


class Flowers(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 4, (count,), generator=generator)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        for image, label in zip(self.images, self.labels):
            row, column = divmod(int(label), 2)
            image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if random.random() < 0.5:
            image = image.flip(-1).flip(-1) * 1.01
        image = image + 0.1 * float(np.random.randn()) + 0.1 * torch.randn(3, 8, 8)
        return {"inputs": [image, {"label": self.labels[index]}], "index": index}


def model(width: int = 4, dropout: float = 0.2):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4),
    )


def dataset(split, samples: int = 110):
    if split == "validation":
        return None
    return Flowers(samples, 0) if split == "train" else Flowers(45, 1)


def loss(model, batch, smoothing: float = 0.1):
    image, rest = batch["inputs"]
    if model.training:
        image = image * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
    logits = model(image).float()
    accuracy = (logits.argmax(1) == rest["label"]).float().mean()
    return (
        F.cross_entropy(logits, rest["label"], label_smoothing=smoothing),
        {"accuracy": accuracy, "confidence": logits.softmax(1).amax(1).mean().item()},
    )


def decode(model, batch):
    return model(batch["inputs"][0]).argmax(1).tolist()
'''
"""110 training samples: 3 batches of 4 workers x 8, and a rest; the last test batch has 5."""

SETTINGS = [
    "workers=4",
    "worker_batch_size=8",
    "epochs=4",
    "optimizer.lr=0.1",
    "optimizer.base_batch_size=null",
    "schedule.warmup_epochs=1",
    "schedule.decay=cosine",
    "precision=fp32",
    "device=cpu",
    "threads=1",
    "log.tensorboard=false",
    "checkpoint.every=2",
    "deterministic=true",
]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "flowers.py"
    path.write_text(FLOWERS)
    return path


def config_for(file: Path | TaskFile, *further: str, preset: str = "eg") -> Config:
    task = file if isinstance(file, TaskFile) else load_task_file(file)
    return load_config(preset, [*SETTINGS, *further], task)


def arguments(file: Path, *further: str, preset: str = "eg") -> list[str]:
    pairs = [*SETTINGS, *further]
    command = ["train", "--task", str(file), "--preset", preset, "--output", "run"]
    return [*command, *[part for pair in pairs for part in ("--set", pair)]]


@pytest.fixture(scope="module")
def undisturbed(
    flowers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that gives the outcome of a run on one rank without loaders."""
    found: dict[Any, dict[str, Any]] = {}

    def outcome_of(*further: str, preset: str = "eg") -> dict[str, Any]:
        key = (preset, *further)
        if key not in found:
            config = config_for(flowers, *further, preset=preset)
            found[key] = outcome(run_here(tmp_path_factory.mktemp("run") / "run", config))
        return found[key]

    return outcome_of


@pytest.fixture(scope="module")
def trained(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run."""
    return run_here(tmp_path_factory.mktemp("trained") / "run", config_for(flowers))


VARIED = {
    "local": ("eg", ()),
    "new samples": ("extragradient", ("extrapolation.samples=new",)),
    "sam": ("sam", ()),
    "local phase": ("postlocal", ("post_local.period=2", "post_local.start=0.5")),
    "held-out samples": ("eg", ("data.validation=20", "evaluate_every=0.5")),
}


@pytest.mark.parametrize(
    ("case", "ranks", "loaders"),
    [("local", 1, 2), ("local", 2, 0), *((case, 2, 2) for case in VARIED)],
)
def test_any_number_of_ranks_and_loaders_gives_the_same_run_bit_for_bit(
    case: str,
    ranks: int,
    loaders: int,
    flowers: Path,
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    preset, further = VARIED[case]
    command = arguments(flowers, *further, f"data.loaders={loaders}", preset=preset)
    for process in run_on_ranks(command, tmp_path, ranks):
        assert process.stderr == ""
    assert outcome(tmp_path / "run") == undisturbed(*further, preset=preset)


def test_the_cases_train_different_nets(undisturbed: Callable[..., dict[str, Any]]) -> None:
    losses = [
        undisturbed(*further, preset=preset)["metrics"][-1]["loss"]
        for preset, further in VARIED.values()
    ]
    assert len(set(losses)) == len(VARIED)


@pytest.mark.parametrize(("before", "after"), [((1, 2), (2, 0)), ((2, 0), (1, 2))])
def test_a_run_that_was_killed_goes_on_with_other_ranks_and_loaders(
    before: tuple[int, int],
    after: tuple[int, int],
    flowers: Path,
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    # Killed while it saves the third checkpoint, after step 6 of 12: epochs have 3 steps.
    slow = ["--nproc", str(before[0])] if before[0] > 1 else []
    fault = {"EGTRAIN_TEST_FAULT": "save-mid-write:3"}
    command = [*arguments(flowers, f"data.loaders={before[1]}"), *slow]
    with Forked(command, tmp_path, fault) as process:
        assert process.wait() != 0
    assert steps_logged(tmp_path / "run") >= 6
    resume = ["train", "--task", str(flowers), "--resume", "run", "--nproc", str(after[0])]
    with Forked([*resume, "--set", f"data.loaders={after[1]}"], tmp_path) as process:
        assert process.wait() == 0, process.stderr
    assert outcome(tmp_path / "run") == undisturbed()


def children_of(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="loaders need Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_loaders_end_with_their_run_and_never_before(
    number: signal.Signals, flowers: Path, tmp_path: Path
) -> None:
    command = arguments(flowers, "data.loaders=2", "epochs=100000", "checkpoint.every=1000000")
    with Forked(command, tmp_path) as process:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
        wait_until(lambda: steps_logged(tmp_path / "run") > 3)
        loaders = children_of(process.pid)
        assert len(loaders) >= 2
        for receiver in [*loaders, process.pid] if number == signal.SIGINT else [process.pid]:
            os.kill(receiver, number)  # a terminal's Ctrl-C reaches them all
        code = process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in loaders), seconds=2)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 75
            (line,) = process.stderr.splitlines()
            assert line.endswith(
                f"a checkpoint was saved; go on with --resume run --task {flowers}"
            )
    with RunLock(tmp_path / "run", patience_seconds=0.5):
        """The next run may begin at once."""


@pytest.mark.skipif(sys.platform != "linux", reason="loaders need Linux")
def test_a_loader_that_is_killed_ends_the_run_with_one_sentence(
    flowers: Path, tmp_path: Path
) -> None:
    command = arguments(flowers, "data.loaders=2", "epochs=100000", "checkpoint.every=1000000")
    with Forked(command, tmp_path) as process:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
        wait_until(lambda: steps_logged(tmp_path / "run") > 3)
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        assert process.wait() == 1
        (line,) = process.stderr.splitlines()
    assert "a process that loads samples has died" in line


# ---- what is computed

TABLE = '''
"""A small net in float64 on a table that lives on the device."""
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

higher_is_better = False


class Streamed(Dataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in self.tensors)


def model():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def dataset(split, form: str = "tensors"):
    if split == "validation":
        return None
    count = 50 if split == "train" else 13
    generator = torch.Generator().manual_seed(len(split))
    x = torch.randn(2 * count, 3, generator=generator, dtype=torch.float64)
    tensors = (x, x.square().sum(dim=1, keepdim=True))
    if form == "tensors":
        return TensorDataset(*(t[count:] for t in tensors))
    if form == "subset":
        return Subset(TensorDataset(*tensors), range(count, 2 * count))
    return Streamed([t[count:] for t in tensors])


def loss(model, batch):
    x, y = batch
    outputs = model(x)
    return nn.functional.mse_loss(outputs, y), {"error": (outputs - y).abs().mean()}
'''


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TaskFile:
    path = tmp_path_factory.mktemp("task") / "table.py"
    path.write_text(TABLE)
    return load_task_file(path)


def run_for(config: Config) -> Run:
    with torch_as_it_was():
        run = build_run(config, Ranks())
    run.model.train()
    return run


def weights_after(run: Run, steps: int) -> Tensor:
    for _ in range(steps):
        take_step(run, 0.1)
    return run.workers.parameters.clone()


@pytest.mark.parametrize("form", ["tensors", "subset", "streamed"])
def test_a_task_file_trains_as_the_naive_loop_does(form: str, table: TaskFile) -> None:
    workers, b, rate, ratio, momentum = 3, 4, 0.1, 0.25, 0.9
    config = config_for(
        table,
        f"task.form={form}",
        f"workers={workers}",
        f"worker_batch_size={b}",
        f"extrapolation.ratio={ratio}",
        "optimizer.weight_decay=0",
    )
    found = weights_after(run_for(config), 9)

    module: Any = table.module
    model = run_for(config).model  # the same initial weights
    x, y = module.dataset("train").tensors
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    past = [[torch.zeros_like(p) for p in model.parameters()] for _ in range(workers)]
    steps_per_epoch = 50 // (workers * b)
    for step in range(9):
        epoch, slot = divmod(step, steps_per_epoch)
        order = torch.randperm(50, generator=generator_for(0, "order", epoch))
        before = [p.detach().clone() for p in model.parameters()]
        mean = [torch.zeros_like(p) for p in before]
        for k in range(workers):
            own = order[(slot * workers + k) * b :][:b]
            with torch.no_grad():
                for p, at, g in zip(model.parameters(), before, past[k], strict=True):
                    p.copy_(at - ratio * rate * g)
            loss = F.mse_loss(model(x[own]), y[own])
            past[k] = list(torch.autograd.grad(loss, list(model.parameters())))
            mean = [m + g / workers for m, g in zip(mean, past[k], strict=True)]
        velocity = [momentum * v + g for v, g in zip(velocity, mean, strict=True)]
        with torch.no_grad():
            for p, at, g, v in zip(model.parameters(), before, mean, velocity, strict=True):
                p.copy_(at - rate * (g + momentum * v))
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_samples_randomness_is_a_function_of_seed_epoch_and_index(flowers: Path) -> None:
    def samples(seed: int, steps: range, *further: str) -> dict[tuple[int, int], Tensor]:
        config = config_for(flowers, f"seed={seed}", *further)
        task = run_for(config).task
        found = {}
        for step in steps:
            for worker in range(config.workers):
                batch = task.batch(worker, step)
                for index, image in zip(batch["index"], batch["inputs"][0], strict=True):
                    found[step // task.steps_per_epoch, int(index)] = image
        return found

    first = samples(0, range(6))
    # Other workers, other mini-batches, another order of asking, and loaders.
    other = samples(0, range(5, -1, -1), "workers=2", "worker_batch_size=16", "data.loaders=1")
    shared = first.keys() & other.keys()
    assert len(shared) > 100
    assert all(torch.equal(first[key], other[key]) for key in shared)
    epochs = [index for epoch, index in first if epoch == 0 and (1, index) in first]
    assert not any(torch.equal(first[0, index], first[1, index]) for index in epochs)
    another = samples(1, range(3))
    both = first.keys() & another.keys()
    assert not any(torch.equal(first[key], another[key]) for key in both)


def test_metrics_are_means_over_all_samples_of_a_split(trained: Path, flowers: Path) -> None:
    saved = egtrain.load_run(trained, task=flowers)
    found = saved.evaluate()
    final = json.loads((trained / "summary.json").read_text())["final"]["test"]
    assert found == final
    module: Any = load_task_file(flowers).module
    test = module.dataset("test")
    images = []
    for index in range(len(test)):
        set_random_state(seed_for(0, "held-out sample", index))
        images.append(test[index]["inputs"][0])
    with torch.inference_mode():
        logits = saved.model(torch.stack(images))
    losses = F.cross_entropy(logits, test.labels, label_smoothing=0.1)
    right = (logits.argmax(1) == test.labels).double().mean()
    assert found["loss"] == pytest.approx(float(losses), abs=1e-6)
    assert found["accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert found["confidence"] == pytest.approx(float(logits.softmax(1).amax(1).mean()), abs=1e-6)
    tests = [line for line in metrics_in(trained) if line["split"] == "test"]
    assert all({"loss", "accuracy", "confidence"} <= line.keys() for line in tests)


def test_the_direction_of_the_metric_decides_which_checkpoint_is_best(
    table: TaskFile, tmp_path: Path
) -> None:
    config = config_for(
        table, "workers=2", "data.validation=10", "evaluate_every=0.5", "checkpoint.every=1"
    )
    directory = run_here(tmp_path / "run", config)
    best = json.loads((directory / "summary.json").read_text())["best"]
    errors = {
        line["step"]: line["error"]
        for line in metrics_in(directory)
        if line["split"] == "validation"
    }
    assert len(errors) > 3
    assert best == {
        "step": min(errors, key=lambda s: errors[s]),
        "validation": {"error": min(errors.values())},
    }


class Pair(NamedTuple):
    one: Tensor
    other: list[Any]


class Graph:
    """A batch of a class of its own."""

    def __init__(self) -> None:
        self.place = "cpu"

    def to(self, device: torch.device) -> "Graph":
        self.place = str(device)
        return self


def test_batches_of_any_form_reach_the_device() -> None:
    transformers = pytest.importorskip("transformers")
    meta = torch.device("meta")
    batch = {
        "a": Pair(torch.ones(2), [torch.ones(2, 3, 4, 4), "text", None, 3]),
        "b": (torch.ones(1),),
    }
    moved = on_device(batch, meta, channels_last=True)
    assert isinstance(moved["a"], Pair)
    assert moved["a"].one.device == moved["a"].other[0].device == moved["b"][0].device == meta
    assert moved["a"].other[1:] == ["text", None, 3]
    assert moved["a"].other[0].is_contiguous(memory_format=torch.channels_last)
    encoding = transformers.BatchEncoding({"input_ids": torch.ones(2, 3)})
    assert on_device(encoding, meta, channels_last=False)["input_ids"].device == meta
    assert on_device(Graph(), meta, channels_last=False).place == "meta"


# ---- every command


def test_config_yaml_holds_the_settings_the_path_and_the_digest(
    trained: Path, flowers: Path
) -> None:
    saved = load_config(trained / "config.yaml")
    task = saved.task.model_dump()
    assert task == {
        "name": "user",
        "file": str(flowers),
        "sha256": load_task_file(flowers).sha256,
        "width": 4,
        "dropout": 0.2,
        "samples": 110,
        "smoothing": 0.1,
    }
    with pytest.raises(UsageError, match=f"runs only where it is named: add --task {flowers}"):
        egtrain.load_run(trained)


def test_eval_decodes_every_sample(
    trained: Path, flowers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command_line(capsys, "eval", str(trained), "--task", str(flowers), "--json")
    found = json.loads(result.stdout)
    decoded = (trained / "decoded-test.txt").read_text().splitlines()
    labels = load_task_file(flowers).module.dataset("test").labels.tolist()  # type: ignore[attr-defined]
    right = sum(int(line) == label for line, label in zip(decoded, labels, strict=True))
    assert found["accuracy"] == pytest.approx(right / len(labels))
    assert found["decoded"] == str(trained / "decoded-test.txt")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_plot_sharpness_measures_the_loss_of_the_task_file(
    processes: str, trained: Path, flowers: Path, tmp_path: Path
) -> None:
    command = ["plot-sharpness", str(trained), "--task", str(flowers), "--samples", "40"]
    command += ["--metrics", "trace", "--device", "cpu", "--output", "out", "--nproc", processes]
    with Forked(command, tmp_path) as process:
        assert process.wait() == 0, process.stderr
    (run,) = json.loads((tmp_path / "out/sharpness.json").read_text())["runs"]
    level = run["checkpoints"][-1]["metrics"]["level"]
    saved = egtrain.load_run(trained, task=flowers)
    order = torch.randperm(saved.task.samples, generator=generator_for(0, "sharpness"))
    total = 0.0
    for batch, size in saved.task.frozen_batches(order[:40].sort().values):
        with torch.no_grad():
            total += float(saved.task.loss(saved.model, batch)[0]) * size
    assert level["train"]["loss"] == pytest.approx(total / 40, rel=1e-5)


def test_a_sweep_takes_a_task_file_and_notices_that_it_has_changed(
    flowers: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(FLOWERS)
    command = ["sweep-batch", "--task", "own.py", "--preset", "sgd", "--preset", "eg"]
    command += ["--batch-sizes", "16,32", "--epochs", "2", "--no-estimate", "--output", "sweep"]
    for setting in ("worker_batch_size=8", "schedule.warmup_epochs=0.5", "optimizer.lr=0.3"):
        command += ["--set", setting]
    with Forked(command, tmp_path) as process:
        assert process.wait() == 0, process.stderr
    results = json.loads((tmp_path / "sweep/results.json").read_text())
    assert "accuracy" in json.dumps(results)
    assert len(list((tmp_path / "sweep/cells").iterdir())) == 4
    own.write_text(FLOWERS + "# changed\n")
    with Forked(command, tmp_path) as process:
        assert process.wait() == 2
        assert "holds another sweep" in process.stderr
    (cell,) = (tmp_path / "sweep/cells").glob("eg-b16-s0")
    digest = load_config(cell / "config.yaml").task.model_dump()["sha256"]
    again = ["train", "--task", "own.py", "--preset", "eg", "--set", f"task.sha256={digest}"]
    with Forked([*again, "--output", "again"], tmp_path) as process:
        assert process.wait() == 2
        assert "own.py has changed since" in process.stderr
    assert not (tmp_path / "again").exists()


def test_bench_and_dry_run_take_a_task_file(
    flowers: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--task", str(flowers), "--preset", "eg", "--device", "cpu", "--json"]
    small = ["--set", "worker_batch_size=8", "--set", "threads=1"]
    timed = command_line(capsys, "bench", *common, *small, "--rounds", "2", "--variants", "local")
    assert json.loads(timed.stdout)["variants"].keys() == {"none", "local"}
    planned = command_line(capsys, "train", *common, *small, "--workers", "2", "--dry-run")
    plan = json.loads(planned.stdout)
    assert plan["samples"] == 110
    assert plan["parameters"] == 188
    assert not list(tmp_path.iterdir())


def test_a_tensor_dataset_lives_on_the_device_and_is_known_by_its_content(table: TaskFile) -> None:
    def digest_of(form: str) -> str:
        return run_for(config_for(table, f"task.form={form}")).data.digest

    assert digest_of("tensors") != digest_of("streamed")
    task: Any = run_for(config_for(table, "workers=2")).task
    assert task._tensors.keys() == {"train", "test"}
    x, y = table.module.dataset("train").tensors  # type: ignore[attr-defined]
    whole = TensorDataset(x, y)
    part: Any = Subset(whole, [4, 2])
    data = UserData(table, {}, {"train": part, "test": whole}, {"train": 2, "test": 50}, "")
    tensors = data.tensors("train")
    assert tensors is not None
    assert torch.equal(tensors[0], x[[4, 2]])


def test_randomness_of_the_loss_depends_on_the_worker_and_the_step(flowers: Path) -> None:
    run = run_for(config_for(flowers))
    batch = run.task.batch(0, 0)
    values = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        random.seed(time.time_ns())
        np.random.seed(time.time_ns() % 2**32)  # noqa: NPY002
        values.append(float(run.task.loss(run.model, batch)[0].detach()))
    assert values[0] == values[1] != values[2]


def test_checkpoints_hold_the_plain_weights(trained: Path, flowers: Path) -> None:
    file = max((trained / "checkpoints").glob("*.pt"))
    model: nn.Module = load_task_file(flowers).module.model()  # type: ignore[attr-defined]
    model.load_state_dict(read_checkpoint(file)[1]["model"], strict=False)
    saved = egtrain.load_run(trained, task=str(flowers))
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(model.eval()(images), saved.model(images))
