"""Lightning, Hugging Face's Trainer and Accelerate make the updates of a plain loop."""

import contextlib
import functools
import itertools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from accelerate import DistributedType
from framework_runs import (
    CLIP,
    DIRECTIONS,
    EPOCHS,
    PARTS,
    RATE,
    RUNS,
    SAMPLES,
    UPDATES,
    Batch,
    ExtrapolationTrainer,
    Module,
    Samples,
    Trajectory,
    expected,
    flat,
    numbers,
    optimizer_of,
    quiet_trainer,
    reset_accelerate,
    small_network,
    squared_error,
)
from helpers import on_two_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from egtrain.integrations import lightning
from egtrain.integrations.lightning import ExtrapolationCallback
from egtrain.integrations.second_gradient import nothing_else_changes
from egtrain.integrations.states import load_own, own_part
from egtrain.optim import (
    Direction,
    Extragradient,
    Extrapolation,
    LocalGradient,
    OptimisticGradient,
)

pytestmark = [
    pytest.mark.timeout(180),
    # Lightning's own advice, and its use of a name that torch is about to give up.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
CASES = [
    (run, name)
    for run in RUNS
    for name, direction in DIRECTIONS.items()
    # A module with manual optimization takes its second gradient itself; scaled ones are refused.
    if run in ("lightning", "transformers", "accelerate") or direction.gradients == 1
]


def all_runs(folder: Path) -> dict[tuple[str, str], tuple[Trajectory, Trajectory]]:
    """Return of each run the whole, and what it is when it goes on from its first epoch."""
    found = {}
    for run, name in CASES:
        directory = folder / f"{run} {name}"
        whole = RUNS[run](DIRECTIONS[name], directory)
        found[run, name] = whole, RUNS[run](DIRECTIONS[name], directory, resume=True)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return all_runs(tmp_path_factory.mktemp("alone"))


def runs_in_this_folder() -> Any:
    return all_runs(Path())


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_two_ranks(runs_in_this_folder, tmp_path_factory.mktemp("ranks"))


def test_the_runs_clip_and_each_direction_makes_another() -> None:
    for of in ("lightning", "transformers"):
        plain = {
            (name, clip): expected(of, direction, workers=2, clip=clip)
            for name, direction in DIRECTIONS.items()
            for clip in (CLIP, None)
        }
        for a, b in itertools.combinations(plain, 2):
            assert largest_difference(plain[a], plain[b]) > 1e-4, f"{of}: {a} and {b}"


def largest_difference(found: Trajectory, other: Trajectory) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize(("run", "name"), CASES)
def test_a_framework_in_one_process_is_a_plain_loop(run: str, name: str, alone: Any) -> None:
    plain = expected(run, DIRECTIONS[name], workers=1)
    assert len(plain) == EPOCHS * UPDATES
    assert largest_difference(alone[run, name][0], plain) < 1e-12


@pytest.mark.parametrize(("run", "name"), CASES)
def test_a_framework_on_two_processes_is_a_plain_loop_of_two_workers(
    run: str, name: str, on_ranks: Any
) -> None:
    plain = expected(run, DIRECTIONS[name], workers=2)
    for rank in range(2):
        assert largest_difference(on_ranks[rank][run, name][0], plain) < 1e-12


@pytest.mark.parametrize(("run", "name"), CASES)
def test_a_framework_goes_on_from_its_checkpoint_bit_for_bit(
    run: str, name: str, alone: Any, on_ranks: Any
) -> None:
    for whole, resumed in (alone[run, name], *(found[run, name] for found in on_ranks)):
        assert len(resumed) == UPDATES
        for a, b in zip(resumed, whole[UPDATES:], strict=True):
            assert torch.equal(a, b)


# Lightning.


def batches(count: int = UPDATES) -> Any:
    samples = Samples(numbers, workers=1)
    return DataLoader([samples.batch(u, 0, 0) for u in range(count)], batch_size=None)


def fit(module: pl.LightningModule, **further: Any) -> pl.Trainer:
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, **further)
    trainer.fit(module, batches())
    return trainer


class Noisy(Module):
    """A module whose second gradient could disturb its dropout and its BatchNorm statistics."""

    def __init__(self, direction: Direction) -> None:
        super().__init__(ExtrapolationCallback(direction))
        torch.manual_seed(7)
        self.network = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        ).double()


def test_a_second_gradient_leaves_random_states_and_statistics_in_lightning() -> None:
    # A shift of no length: only what the further pass leaves behind could make a difference.
    networks = []
    for direction in (Extragradient(ratio=0.0), LocalGradient(ratio=0.0)):
        module = Noisy(direction)
        fit(module)
        networks.append(module.network)
    for a, b in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(a, b)


class Watched(Module):
    """A module that notes its first weight in training and in validation, before each update."""

    def __init__(self) -> None:
        super().__init__(ExtrapolationCallback(LocalGradient(ratio=1.0)))
        self.seen: list[tuple[str, float]] = []

    def note(self, where: str) -> None:
        self.seen.append((where, self.network[0].weight[0, 0].item()))

    def training_step(self, batch: Batch, number: int) -> Tensor | None:
        self.note("training")
        return super().training_step(batch, number)

    def validation_step(self, batch: Batch, number: int) -> None:
        with self.shift.shifted() if number else contextlib.nullcontext():
            self.note("validation")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note("update")


def test_lightning_trains_at_shifted_weights_and_validates_at_the_others() -> None:
    module = Watched()
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, val_check_interval=2)
    trainer.fit(module, batches(2), batches(1))
    sanity, first, update, shifted, unshifted, validation = module.seen
    assert [where for where, _ in module.seen] == [
        "validation",
        *["training", "update"] * 2,
        "validation",
    ]
    assert first[1] == update[1] == sanity[1]
    assert shifted[1] != unshifted[1]
    assert validation[1] == module.network[0].weight[0, 0].item()


def test_in_validation_the_block_of_the_callback_changes_nothing() -> None:
    module = Watched()
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, val_check_interval=2)
    trainer.validate(module, batches(2), verbose=False)
    trainer.fit(module, batches(2), batches(2))
    trainer.validate(module, batches(2), verbose=False)
    seen = [weight for where, weight in module.seen if where == "validation"]
    assert seen[:4] == [seen[0]] * 4
    assert seen[4:] == [module.network[0].weight[0, 0].item()] * 4


class Failing(Module):
    """A module that returns no loss, or fails, in its second step."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(ExtrapolationCallback(LocalGradient(ratio=1.0)))
        self.error = error

    def training_step(self, batch: Batch, number: int) -> Tensor | None:
        if number != 1:
            return super().training_step(batch, number)
        if self.error is not None:
            raise self.error
        return None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_left_out_in_lightning() -> None:
    module = Failing(None)
    fit(module)
    network = small_network()
    optimizer, scheduler, found = optimizer_of(network)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        if number != 1:
            with extrapolation.shifted():
                torch.autograd.backward(squared_error(network, batch))
        optimizer.step()
        scheduler.step()
    assert largest_difference(module.found, found) == 0


def test_a_step_that_fails_leaves_the_weights_unshifted_in_lightning() -> None:
    module = Failing(KeyError("a sample"))
    with pytest.raises(KeyError, match="a sample"):
        fit(module)
    assert torch.equal(flat(module.network), module.found[-1])


def test_a_lightning_trainer_may_fit_twice() -> None:
    module = Module(ExtrapolationCallback(LocalGradient(ratio=0.5)))
    trainer = fit(module)
    once = module.found
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    assert len(once) == len(module.found) == UPDATES


class ByClosure(Module):
    """A module with an optimizer that calls its closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.network.parameters(), lr=0.1, max_iter=3)


def test_lbfgs_in_lightning_is_the_step_of_the_extrapolation() -> None:
    direction = LocalGradient(ratio=0.5, precondition="none")
    module = ByClosure(ExtrapolationCallback(direction))
    fit(module)
    network = small_network()
    optimizer = torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=3)
    extrapolation = Extrapolation(optimizer, direction)

    def closure(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = squared_error(network, batch)
        torch.autograd.backward(loss)
        return loss

    for batch in batches():
        extrapolation.step(functools.partial(closure, batch))
    assert torch.equal(flat(module.network), flat(network))


class TwoOptimizers(pl.LightningModule):
    """A module whose layers have an optimizer each."""

    def __init__(self, shifts: list[ExtrapolationCallback]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.shifts = small_network(), shifts

    def configure_callbacks(self) -> list[pl.Callback]:
        return list(self.shifts)

    def configure_optimizers(self) -> Any:
        return optimizers_of_layers(self.network)

    def training_step(self, batch: Batch, number: int) -> None:
        optimizers: Any = self.optimizers()
        with contextlib.ExitStack() as blocks:
            for shift in self.shifts:
                blocks.enter_context(shift.shifted())
            self.manual_backward(squared_error(self.network, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def optimizers_of_layers(network: Any) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(network[0].parameters(), lr=RATE),
        torch.optim.Adam(network[2].parameters(), lr=RATE),
    ]


def test_in_lightning_each_of_two_optimizers_has_a_callback_of_its_own() -> None:
    directions = LocalGradient(ratio=0.5), OptimisticGradient(ratio=0.2)
    module = TwoOptimizers(
        [ExtrapolationCallback(d, optimizer=i) for i, d in enumerate(directions)]
    )
    fit(module)
    assert len({shift.state_key for shift in module.shifts}) == 2
    network = small_network()
    optimizers = optimizers_of_layers(network)
    extrapolations = [Extrapolation(*pair) for pair in zip(optimizers, directions, strict=True)]
    for batch in batches():
        with extrapolations[0].shifted(), extrapolations[1].shifted():
            torch.autograd.backward(squared_error(network, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(flat(module.network), flat(network))


def test_lightning_is_told_what_the_callback_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"has 2 optimizers: say whose .* optimizer=0"):
        fit(TwoOptimizers([ExtrapolationCallback(LocalGradient(ratio=0.5))]))
    trainer = mock.Mock(world_size=2)
    with pytest.raises(ValueError, match="in one process or with strategy='ddp', not with Mock"):
        ExtrapolationCallback(LocalGradient(ratio=0.5)).on_fit_start(trainer, mock.Mock())


def test_the_callback_is_of_the_package_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(ExtrapolationCallback, pl.Callback)

    class OfTheOther:
        """The class in the package `lightning`."""

    monkeypatch.setitem(sys.modules, "lightning", mock.Mock())
    monkeypatch.setitem(sys.modules, "lightning.pytorch", mock.Mock(Callback=OfTheOther))
    found = runpy.run_path(str(lightning.__file__))
    assert issubclass(found["ExtrapolationCallback"], OfTheOther)


# Hugging Face's Trainer and Accelerate.


class Classifier(nn.Module):
    """A model of one's own whose second gradient could disturb its dropout and its statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        ).double()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(inputs) - targets).square().mean()}


def trainer_of(model: nn.Module, direction: Direction, folder: Path) -> ExtrapolationTrainer:
    reset_accelerate()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=SAMPLES,
        learning_rate=0.01,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return ExtrapolationTrainer(
        model, arguments, train_dataset=Samples(numbers, 1), direction=direction
    )


def test_a_second_gradient_leaves_random_states_and_statistics_in_transformers(
    tmp_path: Path,
) -> None:
    models = []
    for direction in (Extragradient(ratio=0.0), LocalGradient(ratio=0.0)):
        models.append(Classifier())
        trainer_of(models[-1], direction, tmp_path).train()
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_gradient_leaves_random_states_and_statistics_in_a_loop_of_ones_own(
    fails: bool,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    statistics = [b.clone() for b in model.buffers()]
    random_state = torch.get_rng_state()
    expected: Any = pytest.raises(MemoryError) if fails else contextlib.nullcontext()
    with expected, nothing_else_changes(model):
        model(torch.randn(8, 3)).sum().backward()
        if fails:
            raise MemoryError
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, model.buffers(), statistics))


def test_a_transformers_trainer_may_train_twice_with_one_extrapolation(tmp_path: Path) -> None:
    trainer = trainer_of(Classifier(), LocalGradient(ratio=0.5), tmp_path)
    trainer.train()
    first = trainer.extrapolation
    trainer.train()
    assert trainer.extrapolation is first
    assert first is not None
    assert first.steps == 2 * UPDATES * PARTS


def test_a_scaled_second_gradient_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(Classifier(), Extragradient(ratio=0.5), tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="that of the loss as GradScaler has scaled it"):
        trainer.train()


def test_a_transformers_trainer_with_sharded_parameters_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(Classifier(), LocalGradient(ratio=0.5), tmp_path)
    trainer.accelerator = mock.Mock(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="with DistributedDataParallel, not with FSDP"):
        trainer.training_step(trainer.model, {})


def test_a_state_that_this_process_has_not_saved_is_missed(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(small_network().parameters(), lr=RATE)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5))
    with pytest.raises(FileNotFoundError, match=r"extrapolation-0.pt is missing: resume with as"):
        load_own(extrapolation, tmp_path)
    state = extrapolation.state_dict()
    states = {"gradient": [torch.cat([t, t]) for t in state["worker_state"]["gradient"]]}
    with pytest.raises(ValueError, match="is that of 2 processes, but there are 1 now"):
        own_part({**state, "workers": [0, 1], "worker_state": states})


def test_no_framework_is_imported_unasked() -> None:
    program = (
        "import sys, egtrain.optim, egtrain.integrations\n"
        "import egtrain.integrations.transformers, egtrain.integrations.accelerate\n"
        "frameworks = {'accelerate', 'lightning', 'pytorch_lightning', 'transformers'}\n"
        "sys.exit(str(frameworks & set(sys.modules)) if frameworks & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
