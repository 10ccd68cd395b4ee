"""The same tiny runs by Lightning, by Hugging Face's Trainer, with Accelerate and by a plain loop.

Each has 2 epochs of 3 updates of 2 micro-batches a worker, in float64, with a falling rate and
gradients clipped by their norm. A run returns the weights after each update.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import AutocastKwargs
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from egtrain.integrations.accelerate import save_with
from egtrain.integrations.lightning import ExtrapolationCallback
from egtrain.integrations.transformers import ExtrapolationMixin
from egtrain.optim import (
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    LocalGradient,
    OptimisticGradient,
)

DIRECTIONS: dict[str, Direction] = {
    "local": LocalGradient(ratio=0.5),
    "optimistic": OptimisticGradient(ratio=0.5),
    "gaussian": GaussianNoise(size=0.05),
    "sam": SAM(radius=0.05),
    "extragradient": Extragradient(ratio=0.5),
}
EPOCHS, UPDATES, PARTS, SAMPLES = 2, 3, 2, 4
RATE, SEED = 0.2, 42
CLIP = 1.0
"""The default of Hugging Face's Trainer."""

Trajectory = list[Tensor]
"""The weights after each update, in one vector."""
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# What is trained.


def small_network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def small_gpt2() -> nn.Module:
    torch.manual_seed(7)
    sizes = {"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    further = {"initializer_range": 0.3, "loss_type": "ForCausalLM"}
    config = GPT2Config(**sizes, **no_dropout, **further, bos_token_id=0, eos_token_id=0)
    model: nn.Module = GPT2LMHeadModel(config).double()
    return model


def squared_error(network: nn.Module, batch: Batch) -> Tensor:
    return (network(batch["inputs"]) - batch["targets"]).square().mean()


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = network(**batch).loss
    return loss


class Samples(Dataset[Batch]):
    """Samples in the order of updates, micro-batches, workers."""

    def __init__(self, of: Callable[[torch.Generator], Batch], workers: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.samples = [of(generator) for _ in range(UPDATES * PARTS * workers * SAMPLES)]
        self.workers = workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Batch:
        return self.samples[number]

    def batch(self, update: int, part: int, worker: int) -> Batch:
        start = ((update * PARTS + part) * self.workers + worker) * SAMPLES
        chosen = self.samples[start : start + SAMPLES]
        return {name: torch.stack([s[name] for s in chosen]) for name in chosen[0]}


def numbers(generator: torch.Generator) -> Batch:
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    return {"inputs": values[:4], "targets": 4 * values[4:]}


def tokens(generator: torch.Generator) -> Batch:
    found = torch.randint(11, (6,), generator=generator)
    # The first is not predicted; without the mark, the Trainer counts it all the same.
    return {"input_ids": found, "labels": torch.cat([torch.tensor([-100]), found[1:]])}


def optimizer_of(network: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR, Trajectory]:
    """Return an optimizer, its schedule, and a list that it fills with the weights."""
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    found: Trajectory = []
    optimizer.register_step_post_hook(lambda *_: found.append(flat(network)))
    return optimizer, LambdaLR(optimizer, lambda t: 1 - t / (EPOCHS * UPDATES)), found


# The plain loop.


def plain_loop(
    direction: Direction,
    workers: int,
    network: nn.Module,
    loss_of: Loss,
    samples: Samples,
    clip: float | None = CLIP,
) -> Trajectory:
    """Train in one process, which takes the workers' gradients one after the other."""
    optimizer, scheduler, found = optimizer_of(network)
    extrapolation = Extrapolation(optimizer, direction, workers, seed=SEED)
    for update in [*range(UPDATES)] * EPOCHS:
        gradients = []
        for worker in range(workers):
            optimizer.zero_grad()
            batches = [samples.batch(update, part, worker) for part in range(PARTS)]
            losses = [partial(loss_of, network, batch) for batch in batches]
            if direction.gradients == 2:
                for loss in losses:
                    with shifted_by_hand(direction, network, loss, scheduler.get_last_lr()[0]):
                        torch.autograd.backward(loss() / PARTS)
            else:
                with extrapolation.shifted(worker):
                    for loss in losses:
                        torch.autograd.backward(loss() / PARTS)
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
        for p, *own in zip(network.parameters(), *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0)
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return found


@contextmanager
def shifted_by_hand(
    direction: Direction, network: nn.Module, loss: Callable[[], Tensor], rate: float
) -> Iterator[None]:
    """Shift by the second gradient of a micro-batch, as the formulas say."""
    parameters = list(network.parameters())
    gradient = torch.autograd.grad(loss() / PARTS, parameters)
    if isinstance(direction, SAM):
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        zeta = [-direction.radius * g / norm for g in gradient]
    else:
        assert isinstance(direction, Extragradient)
        assert direction.ratio is not None
        zeta = [direction.ratio * rate * g for g in gradient]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_sub_(parameters, zeta)
    yield
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)


# Lightning.


def quiet_trainer(**further: Any) -> pl.Trainer:
    """Return a trainer on the CPU that prints and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **further,
    )


class Module(pl.LightningModule):
    """The small network in Lightning."""

    def __init__(self, shift: ExtrapolationCallback, manual: bool = False) -> None:
        super().__init__()
        self.network = small_network()
        self.automatic_optimization = not manual
        self.shift = shift
        self.found: Trajectory = []

    def configure_callbacks(self) -> list[pl.Callback]:
        return [self.shift]

    def configure_optimizers(self) -> Any:
        optimizer, scheduler, self.found = optimizer_of(self.network)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch: Batch, number: int) -> Tensor | None:
        if self.automatic_optimization:
            return squared_error(self.network, batch)
        last = number % PARTS == PARTS - 1
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        with optimizer.toggle_model(sync_grad=last), self.shift.shifted():
            self.manual_backward(squared_error(self.network, batch) / PARTS)
        if last:
            self.clip_gradients(optimizer, CLIP, "norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return None


class OnlyScaled(MixedPrecision):
    """Scales the loss as mixed precision does, and computes in float64 all the same."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


def lightning_run(
    direction: Direction,
    folder: Path,
    *,
    manual: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    resume: bool = False,
) -> Trajectory:
    """Train with Lightning; `resume` goes on from the first epoch of the run in the folder."""
    module = Module(ExtrapolationCallback(direction, seed=SEED), manual)
    samples = Samples(numbers, world())
    trainer = quiet_trainer(
        devices=world(),
        strategy="ddp" if world() > 1 else "auto",
        max_epochs=EPOCHS,
        accumulate_grad_batches=1 if manual else PARTS,
        gradient_clip_val=None if manual else CLIP,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        plugins=None if scaler is None else [OnlyScaled("16-mixed", "cpu", scaler)],
    )
    batches = [
        samples.batch(u, p, trainer.global_rank) for u in range(UPDATES) for p in range(PARTS)
    ]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with mock.patch.dict(os.environ):  # Lightning deletes torchrun's variables at its end
        trainer.fit(module, loader, ckpt_path=folder / "epoch=0.ckpt" if resume else None)
    return module.found


# Hugging Face's Trainer.


class ExtrapolationTrainer(ExtrapolationMixin, Trainer):  # type: ignore[misc]
    """A Trainer with extrapolation."""


def transformers_run(
    direction: Direction,
    folder: Path,
    *,
    scaler: torch.amp.GradScaler | None = None,
    resume: bool = False,
) -> Trajectory:
    """Train with transformers; `resume` goes on from the first epoch of the run in the folder."""
    reset_accelerate()
    model = small_gpt2()
    optimizer, scheduler, found = optimizer_of(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=PARTS,
        train_sampling_strategy="sequential",
        save_strategy="epoch",
        seed=SEED,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert arguments.max_grad_norm == CLIP
    trainer = ExtrapolationTrainer(
        model,
        arguments,
        train_dataset=Samples(tokens, world()),
        optimizers=(optimizer, scheduler),
        direction=direction,
    )
    only_scale(trainer.accelerator, scaler)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{UPDATES}") if resume else None)
    return found


# Accelerate.


def accelerate_run(
    direction: Direction,
    folder: Path,
    *,
    scaler: torch.amp.GradScaler | None = None,
    resume: bool = False,
) -> Trajectory:
    """Train with Accelerate; `resume` goes on from the first epoch of the run in the folder."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    only_scale(accelerator, scaler)
    network = small_network()
    torch_optimizer, torch_scheduler, found = optimizer_of(network)
    loader: Any = DataLoader(Samples(numbers, world()), batch_size=SAMPLES)
    model, optimizer, loader = accelerator.prepare(network, torch_optimizer, loader)
    extrapolation = Extrapolation(optimizer, direction, seed=SEED, model=model)
    save_with(accelerator, extrapolation)
    accelerator.register_for_checkpointing(torch_scheduler)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(resume, EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):

                def second_gradient(batch: Batch = batch) -> None:
                    with accelerator.no_sync(model):
                        accelerator.backward(squared_error(model, batch))

                with extrapolation.shifted(gradient=second_gradient):
                    accelerator.backward(squared_error(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if accelerator.sync_gradients:
                    torch_scheduler.step()
                optimizer.zero_grad()
        if epoch == 0 and not resume:
            accelerator.save_state(str(folder))
    return found


def only_scale(accelerator: Accelerator, scaler: torch.amp.GradScaler | None) -> None:
    """Let Accelerate scale the loss as for float16, but compute in float64."""
    if scaler is not None:
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler, accelerator.native_amp = scaler, True
        accelerator.autocast_handler = AutocastKwargs(enabled=False)


def reset_accelerate() -> None:
    """Let Accelerate look at the environment anew; a process group stays."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()


def scaled(run: Callable[..., Trajectory], *arguments: Any, **further: Any) -> Trajectory:
    """Train with a scaled loss; a power of two changes no digit of the gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    return run(*arguments, scaler=scaler, **further)


RUNS: dict[str, Callable[..., Trajectory]] = {
    "lightning": lightning_run,
    "lightning, manual": partial(lightning_run, manual=True),
    "lightning, scaled": partial(scaled, lightning_run),
    "transformers": transformers_run,
    "transformers, scaled": partial(scaled, transformers_run),
    "accelerate": accelerate_run,
    "accelerate, scaled": partial(scaled, accelerate_run),
}


def expected(
    name: str, direction: Direction, workers: int, clip: float | None = CLIP
) -> Trajectory:
    """Return the plain loop's run."""
    if name.startswith("transformers"):
        problem: Any = small_gpt2(), cross_entropy, Samples(tokens, workers)
    else:
        problem = small_network(), squared_error, Samples(numbers, workers)
    return plain_loop(direction, workers, *problem, clip)
