"""Every shipped preset trains, and goes on after an interruption as if nothing had happened."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import digest, flattened, outcome, run_here, torch_as_it_was, write_images, write_texts
from torch import Tensor

from egtrain.build import build_run
from egtrain.config.files import load_config, preset_families, preset_names
from egtrain.config.schema import Config
from egtrain.errors import InterruptedRun
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks

FAMILY = "resnet"
"""The family whose presets are resumed from files, as a user does it; the others are resumed in
memory, for speed."""
FROM_FILES = [
    *(f"{FAMILY}-{variant}" for variant in preset_families()[FAMILY]),
    "quickstart",
    "quickstart-sgd",
]
IN_MEMORY = [name for name in preset_names() if name not in FROM_FILES]
TINY_MODELS = {
    "resnet": ["model.depth=8", "model.width=2"],
    "vgg": ["model.width=2"],
    "lstm": ["model.width=4", "model.layers=2", "task.bptt=5"],
    "transformer": [
        "model.width=8",
        "model.layers=1",
        "model.heads=2",
        "model.feedforward=8",
        "task.subwords=40",
    ],
}
DATA = {
    "resnet": "npz:{}/8.npz",
    "vgg": "npz:{}/32.npz",
    "lstm": "text:{}",
    "transformer": "pairs:{}",
}
"""Two batches of eight, and a rest. VGG-11 halves the size of images five times."""
STEPS, INTERRUPTED = 4, 3
"""One step of warm-up, one at the full rate, and two in what may be a local phase, interrupted
within its period."""
Tiny = Callable[[str], Config]
Trained = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return a function that gives a preset made small."""
    folder = tmp_path_factory.mktemp("data")
    for size in (8, 32):
        write_images(folder / f"{size}.npz", train=20, test=4, size=size)
    write_texts(folder, words=93, pairs=20)

    def tiny_preset(name: str) -> Config:
        full = load_config(name)
        settings = [
            f'data.name="{DATA[full.model.name].format(folder)}"',
            "data.train_samples=null",
            *TINY_MODELS[full.model.name],
            "workers=2",
            "worker_batch_size=4",
            f"steps={STEPS}",
            "evaluate_every=1000",
            "schedule.warmup_epochs=0.5",
            "precision=fp32",
            "device=cpu",
            "threads=1",
            "deterministic=true",
            "log.tensorboard=false",
        ]
        if full.post_local.period is not None:
            settings.append("post_local.period=2")
        return load_config(name, settings)

    return tiny_preset


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a function that gives the outcome of a tiny preset's undisturbed run."""
    return cache(
        lambda name: outcome(run_here(tmp_path_factory.mktemp("undisturbed") / "run", tiny(name)))
    )


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_preset_trains_and_an_interruption_changes_nothing(
    name: str, tiny: Tiny, trained: Trained, tmp_path: Path
) -> None:
    config = tiny(name)
    with pytest.raises(InterruptedRun, match=f"interrupted after step {INTERRUPTED}"):
        run_here(tmp_path / "run", config, stop_after=INTERRUPTED)
    assert outcome(run_here(tmp_path / "run", config, resume=True)) == trained(name)


def test_every_variant_trains_another_net(trained: Trained) -> None:
    """Otherwise the test above would hold for a variant that does nothing."""
    variants = preset_families()[FAMILY]
    assert len(
        {trained(f"{FAMILY}-{variant}")["metrics"][-1]["loss"] for variant in variants}
    ) == len(variants)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_preset_trains_and_goes_on_from_its_state(name: str, tiny: Tiny) -> None:
    with torch_as_it_was():
        config = tiny(name)
        run, resumed = build_run(config, Ranks()), build_run(config, Ranks())
        resumed.load_state_dict(copy.deepcopy(steps_taken(run, INTERRUPTED).state_dict()))
        assert state_of(steps_taken(resumed, STEPS)) == state_of(steps_taken(run, STEPS))


def steps_taken(run: Run, until: int) -> Run:
    """Return the run after so many steps."""
    run.model.train()
    while run.step < until:
        assert take_step(run, run.schedule(run.step)).isfinite().all()
    return run


def state_of(run: Run) -> dict[str, Any]:
    """Return all that makes up the run's state."""
    leaves = flattened(run.state_dict())
    return {
        name: digest(leaf) if isinstance(leaf, Tensor) else leaf for name, leaf in leaves.items()
    }
