"""What only a GPU can show; each promise has a test on the CPU too."""

import numpy as np
import pytest
import torch

from egtrain.build import build_run
from egtrain.config_files import load_config
from egtrain.evaluate import evaluate
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.train import Run, take_step
from egtrain.workers import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TINY = ["data.name=synthetic", "workers=4", "worker_batch_size=32"]
MODELS = {
    "resnet": ["model.depth=8", "model.width=4"],
    "lstm": ["model.layers=2", "model.width=32"],
    "transformer": ["model.layers=1", "model.width=32", "task.subwords=300"],
}


def stepped(preset: str, device: torch.device, *settings: str, steps: int = 3) -> tuple[Run, np.ndarray]:
    small = [*TINY, *MODELS[preset.partition("-")[0]]]
    run = build_run(load_config(preset, [*small, *settings]), Ranks(device=device))
    run.model.train()
    rows = [take_step(run, 0.05).double().cpu().numpy() for _ in range(steps)]
    return run, np.stack(rows)


@pytest.mark.parametrize(
    "preset", ["resnet-sgd", "resnet-eg", "resnet-sam", "resnet-smoothout", "lstm-eg", "transformer-eg"]
)
def test_deterministic_training_repeats_bit_for_bit(preset: str) -> None:
    device = torch.device("cuda")
    (first, rows), (second, again) = (stepped(preset, device, "deterministic=true") for _ in range(2))
    assert torch.equal(first.workers.parameters, second.workers.parameters)
    assert np.array_equal(rows, again)


def test_the_first_step_is_that_of_the_cpu() -> None:
    settings = ["precision=fp32", "task.augment=false", "seed=5"]
    _, on_gpu = stepped("resnet-sgd", torch.device("cuda"), *settings, steps=1)
    assert np.isfinite(on_gpu).all()
    # The order of the images is drawn on the device, so the batches differ; the initial loss is log(10) on both.
    _, on_cpu = stepped("resnet-sgd", torch.device("cpu"), *settings, steps=1)
    assert on_gpu[0, 0] == pytest.approx(on_cpu[0, 0], abs=0.05)


@pytest.mark.parametrize("preset", ["lstm-eg", "transformer-eg"])
def test_the_first_steps_on_text_are_those_of_the_cpu(preset: str) -> None:
    """Mini-batches of text are chosen on the host, so the same words are seen."""
    settings = ["precision=fp32", "seed=5", "model.dropout=0"]
    (_, on_gpu), (_, on_cpu) = (stepped(preset, torch.device(name), *settings) for name in ("cuda", "cpu"))
    assert on_gpu[:, 0] == pytest.approx(on_cpu[:, 0], rel=1e-3)


@pytest.mark.parametrize("preset", ["lstm-eg", "transformer-eg"])
def test_evaluation_on_text_is_that_of_the_cpu(preset: str) -> None:
    found = []
    for name in ("cuda", "cpu"):
        run, _ = stepped(preset, torch.device(name), "precision=fp32", "seed=5", "model.dropout=0", steps=1)
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
