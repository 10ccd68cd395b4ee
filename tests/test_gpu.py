"""What only a GPU can show; each promise has a test on the CPU too."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import config_of, outcome, run_here

from egtrain.build import build_run
from egtrain.config.files import load_config
from egtrain.errors import InterruptedRun
from egtrain.evaluate import evaluate
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY = ["data.name=synthetic", "workers=4", "worker_batch_size=32"]
MODELS = {
    "resnet": ["model.depth=8", "model.width=4"],
    "lstm": ["model.layers=2", "model.width=32"],
    "transformer": ["model.layers=1", "model.width=32", "task.subwords=300"],
}


def stepped(
    preset: str, device: torch.device, *settings: str, steps: int = 3, learning_rate: float = 0.05
) -> tuple[Run, np.ndarray]:
    small = [*TINY, *MODELS[preset.partition("-")[0]]]
    run = build_run(load_config(preset, [*small, *settings]), Ranks(device=device))
    run.model.train()
    rows = [take_step(run, learning_rate).double().cpu().numpy() for _ in range(steps)]
    return run, np.stack(rows)


@pytest.mark.parametrize(
    "preset",
    ["resnet-sgd", "resnet-eg", "resnet-sam", "resnet-smoothout", "lstm-eg", "transformer-eg"],
)
def test_deterministic_training_repeats_bit_for_bit(preset: str) -> None:
    device = torch.device("cuda")
    (first, rows), (second, again) = (
        stepped(preset, device, "deterministic=true") for _ in range(2)
    )
    assert torch.equal(first.workers.parameters, second.workers.parameters)
    assert np.array_equal(rows, again)


def test_the_loss_of_images_is_that_of_the_cpu() -> None:
    config = load_config("resnet-sgd", [*TINY, *MODELS["resnet"], "precision=fp32"])
    runs = {name: build_run(config, Ranks(device=torch.device(name))) for name in ("cpu", "cuda")}
    # The order of the images is drawn on the device, so the batches of a step differ.
    images, labels = runs["cpu"].task.batch(0, 0)
    losses = [
        run.task.loss(run.model, (images.to(name), labels.to(name)))[0].item()
        for name, run in runs.items()
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("preset", ["resnet-eg", "resnet-eg-lars", "lstm-eg", "transformer-eg"])
def test_a_step_does_not_wait_for_the_device(preset: str) -> None:
    run, _ = stepped(preset, torch.device("cuda"), "deterministic=false")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        take_step(run, 0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "further", [[], ["post_local.period=3", "post_local.start=0.3"]], ids=["shared", "local"]
)
def test_an_interrupted_run_ends_as_if_it_was_not(
    further: list[str], images: Path, tmp_path: Path
) -> None:
    config = config_of(images, *further, "device=cuda")
    whole = outcome(run_here(tmp_path / "whole", config))
    with pytest.raises(InterruptedRun):
        run_here(tmp_path / "run", config, stop_after=5)
    assert outcome(run_here(tmp_path / "run", config, resume=True)) == whole


@pytest.mark.parametrize("preset", ["lstm-eg", "transformer-eg"])
def test_the_first_steps_on_text_are_those_of_the_cpu(preset: str) -> None:
    """Mini-batches of text are chosen on the host, so the same words are seen."""
    settings = ["precision=fp32", "seed=5", "model.dropout=0"]
    # Adam's first update has the sign of every gradient, also where it is nothing but rounding: a
    # small one, therefore.
    rate = 0.05 if preset.startswith("lstm") else 1e-4
    (_, on_gpu), (_, on_cpu) = (
        stepped(preset, torch.device(name), *settings, learning_rate=rate)
        for name in ("cuda", "cpu")
    )
    assert on_gpu[:, 0] == pytest.approx(on_cpu[:, 0], rel=1e-3)


@pytest.mark.parametrize("preset", ["lstm-eg", "transformer-eg"])
def test_evaluation_on_text_is_that_of_the_cpu(preset: str) -> None:
    found = []
    for name in ("cuda", "cpu"):
        run, _ = stepped(
            preset, torch.device(name), "precision=fp32", "seed=5", "model.dropout=0", steps=1
        )
        found.append(evaluate(run.task, run.model, "test", Ranks(device=torch.device(name))))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)


def test_an_lstm_stays_in_full_precision_under_autocast() -> None:
    """PyTorch's autocast would give cuDNN's in fp16."""
    model = LSTMLanguageModel(20, width=16, layers=2, dropout=0.0, columns=4).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits, state = model(torch.zeros(5, 4, dtype=torch.long, device="cuda"))
    assert (logits.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("preset", ["resnet-eg", "lstm-eg", "transformer-eg"])
def test_mixed_precision_is_used_where_the_gpu_has_it(preset: str) -> None:
    _, rows = stepped(preset, torch.device("cuda"), "precision=bf16")
    assert np.isfinite(rows).all()
