"""Every choice of ζ agrees with the slow reference, and keeps the promises of the framework."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from own_directions import AverageOfGradients, AverageOfUpdates
from reference import Base, Reference, Zeta
from tiny_run import RATES, TinyTask, tiny_net, tiny_run, train_watched
from torch import Tensor, nn

from egtrain.config.extrapolations import ROWS as CHOICES
from egtrain.config.extrapolations import SECTIONS
from egtrain.optim import (
    MSAM,
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    Nesterov,
    OptimisticGradient,
    SmoothOut,
)
from egtrain.optim.direction import Point
from egtrain.optim.randomness import generator_for, seed_for
from egtrain.optim.scaling import scaled_to_weights

# ---------------------------------------------------------------------------------------------
# The fast path and the reference, step by step

NESTEROV = Base(clip_norm=2.5)
PLAIN = Base(momentum=0.0, nesterov=False, weight_decay=0.0)
HEAVY_BALL = Base(nesterov=False, clip_norm=2.5)
OTHER_BASES = [Base(name=name, clip_norm=3.5) for name in ("lars", "lamb", "adam", "adamw")]
GRADIENT_ROWS: dict[str, Any] = {
    "local": LocalGradient,
    "optimistic": OptimisticGradient,
    "gradient-noise": GradientNoise,
    "extragradient": Extragradient,
}
NOISE_ROWS: dict[str, Any] = {"gaussian": GaussianNoise, "smoothout": SmoothOut}
ROWS: list[tuple[Zeta, Direction | None, Base]] = [
    (Zeta(), None, NESTEROV),
    (Zeta(), None, PLAIN),
    (Zeta("local", ratio=0.25), LocalGradient(ratio=0.25), NESTEROV),
    (Zeta("local", ratio=0.25), LocalGradient(ratio=0.25), HEAVY_BALL),
    (Zeta("local", ratio=1.0), LocalGradient(ratio=1.0), PLAIN),
    (Zeta("local", rate=0.03), LocalGradient(rate=0.03), NESTEROV),
    (
        Zeta("local", size=0.05, scaling="layer"),
        LocalGradient(size=0.05, scaling="layer"),
        NESTEROV,
    ),
    (
        Zeta("local", size=0.05, scaling="filter"),
        LocalGradient(size=0.05, scaling="filter"),
        NESTEROV,
    ),
    (Zeta("local", ratio=0.25, until=4), LocalGradient(ratio=0.25), NESTEROV),
    (Zeta("optimistic", ratio=0.5), OptimisticGradient(ratio=0.5), NESTEROV),
    (Zeta("optimistic", ratio=1.0), OptimisticGradient(ratio=1.0), PLAIN),
    (Zeta("optimistic", rate=0.03), OptimisticGradient(rate=0.03), NESTEROV),
    (
        Zeta("optimistic", size=0.05, scaling="layer"),
        OptimisticGradient(size=0.05, scaling="layer"),
        NESTEROV,
    ),
    (
        Zeta("optimistic", size=0.05, scaling="filter"),
        OptimisticGradient(size=0.05, scaling="filter"),
        NESTEROV,
    ),
    (Zeta("gradient-noise", ratio=0.5), GradientNoise(ratio=0.5), NESTEROV),
    (Zeta("gradient-noise", ratio=0.5), GradientNoise(ratio=0.5), PLAIN),
    (Zeta("gradient-noise", rate=0.03), GradientNoise(rate=0.03), NESTEROV),
    (
        Zeta("gradient-noise", size=0.05, scaling="layer"),
        GradientNoise(size=0.05, scaling="layer"),
        NESTEROV,
    ),
    (
        Zeta("gradient-noise", size=0.05, scaling="filter"),
        GradientNoise(size=0.05, scaling="filter"),
        NESTEROV,
    ),
    (Zeta("extragradient", ratio=0.5), Extragradient(ratio=0.5), NESTEROV),
    (Zeta("extragradient", ratio=1.0), Extragradient(ratio=1.0), PLAIN),
    (Zeta("extragradient", ratio=0.5, samples="new"), Extragradient(ratio=0.5), NESTEROV),
    (Zeta("extragradient", rate=0.03, samples="new", until=4), Extragradient(rate=0.03), NESTEROV),
    (
        Zeta("extragradient", size=0.05, scaling="layer"),
        Extragradient(size=0.05, scaling="layer"),
        NESTEROV,
    ),
    (
        Zeta("extragradient", size=0.05, scaling="filter"),
        Extragradient(size=0.05, scaling="filter"),
        NESTEROV,
    ),
    (Zeta("sam", size=0.1), SAM(radius=0.1), NESTEROV),
    (Zeta("sam", size=0.1), SAM(radius=0.1), PLAIN),
    *(
        (
            Zeta(name, size=0.05, scaling=scaling, norm_and_bias=norm_and_bias),
            NOISE_ROWS[name](size=0.05, scaling=scaling, norm_and_bias=norm_and_bias),
            NESTEROV,
        )
        for name in NOISE_ROWS
        for scaling in ("none", "layer", "filter")
        for norm_and_bias in (False, True)
    ),
    *((Zeta("msam", size=0.1), MSAM(radius=0.1), base) for base in (HEAVY_BALL, *OTHER_BASES)),
    (Zeta("msam", size=0.1, until=5, every=3), MSAM(radius=0.1), HEAVY_BALL),
    (Zeta("nesterov"), Nesterov(), HEAVY_BALL),
    (Zeta("nesterov", until=5), Nesterov(), HEAVY_BALL),
    (Zeta("extragradient", ratio=0.5, every=2), Extragradient(ratio=0.5), NESTEROV),
    (
        Zeta("extragradient", ratio=0.5, samples="new", until=5, every=3),
        Extragradient(ratio=0.5),
        NESTEROV,
    ),
    (Zeta("sam", size=0.1, every=2), SAM(radius=0.1), NESTEROV),
    *(
        (Zeta(name, **settings), direction(**settings), base)
        for base in OTHER_BASES
        for name, direction in GRADIENT_ROWS.items()
        for settings in [
            {"ratio": 0.25},
            *([{"rate": 0.03}, {"size": 0.05, "scaling": "layer"}] if name == "local" else []),
            *(
                [{"ratio": 0.25, "precondition": "none"}]
                if name in ("local", "extragradient")
                else []
            ),
        ]
    ),
    (
        Zeta("local", ratio=0.25, precondition="none"),
        LocalGradient(ratio=0.25, precondition="none"),
        NESTEROV,
    ),
    *(
        (Zeta("gaussian", size=0.05, scaling="filter"), GaussianNoise(size=0.05), base)
        for base in OTHER_BASES
    ),
    *((Zeta("sam", size=0.1), SAM(radius=0.1), base) for base in OTHER_BASES),
    *((Zeta(), None, base) for base in OTHER_BASES),
    *(
        (
            Zeta("average of updates", ratio=2.5, decay=0.7),
            AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.2),
            base,
        )
        for base in (NESTEROV, PLAIN, *OTHER_BASES)
    ),
    (
        Zeta("average of updates", ratio=2.5, decay=0.7, every=2),
        AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.2),
        NESTEROV,
    ),
    (
        Zeta("average of gradients", ratio=0.25, decay=0.6),
        AverageOfGradients(ratio=0.25, decay=0.6),
        NESTEROV,
    ),
]


def row_name(row: object) -> str | None:
    if isinstance(row, Zeta):
        changed = [
            f"{name}={value}" for name, value in vars(row).items() if value != getattr(Zeta, name)
        ]
        return "-".join(changed) or "none"
    if isinstance(row, Base):
        return {NESTEROV: "nesterov", PLAIN: "plain", HEAVY_BALL: "heavyball"}.get(row, row.name)
    return ""


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Assert that the largest difference is small against the largest entry."""
    assert found.dtype == expected.dtype == torch.float64
    assert found.shape == expected.shape
    if found.numel():
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(("zeta", "direction", "base"), ROWS, ids=row_name)
def test_the_engine_agrees_with_the_reference_step_by_step(
    zeta: Zeta, direction: Direction | None, base: Base
) -> None:
    workers, seed, steps = 4 if base.name == "sgd" else 2, 3, 7
    task = TinyTask(workers, torch.float64)
    reference = Reference(
        tiny_net(),
        workers,
        zeta,
        base,
        loss=lambda model, batch: task.loss(model, batch)[0],
        batch=task.batch,
        extra_batch=task.extra_batch,
        generator=lambda worker, step: generator_for(seed, "extrapolation", worker, step),
        dropout_seed=lambda worker, step: seed_for(seed, "dropout", worker, step),
    )
    run = tiny_run(
        direction,
        base,
        workers=workers,
        new_samples=zeta.samples == "new",
        steps=steps,
        until=min(zeta.until, steps),
        every=zeta.every,
        seed=seed,
    )
    factors, shifts = [], []
    noise_scale = {"squared_gradient": 0.0, "noise_trace": 0.0}

    def compare(step: int, metrics: dict[str, float]) -> None:
        expected = reference.step(RATES[step - 1])
        factors.append(expected.clip_factor)
        shifts.append(expected.relative_size)

        assert_close(run.workers.parameters.detach(), flat(reference.weights))
        states = [run.optimizer.state[p] for p in run.model.parameters() if p.requires_grad]
        if reference.velocity is not None:
            name = "momentum_buffer" if base.name in ("sgd", "lars") else "exp_avg"
            assert_close(flat([state[name] for state in states]), flat(reference.velocity))
        if reference.second_moment is not None:
            assert_close(
                flat([state["exp_avg_sq"] for state in states]), flat(reference.second_moment)
            )
        if reference.trust_ratios is not None:
            found = torch.stack([state["trust_ratio"] for state in states])
            assert_close(found, torch.tensor(reference.trust_ratios, dtype=torch.float64))
        statistics = [flat([m.norm.running_mean, m.norm.running_var]) for m in reference.models]
        assert_close(run.workers.state_dict()["buffers"], torch.stack(statistics))

        assert metrics["loss"] == pytest.approx(sum(expected.losses) / workers, rel=1e-12)
        assert metrics["gradient_norm"] == pytest.approx(
            expected.squared_norm_of_mean**0.5, rel=1e-12
        )
        mean_squared_norm = sum(expected.squared_norms) / workers
        assert metrics["local_gradient_norm"] == pytest.approx(mean_squared_norm**0.5, rel=1e-12)
        assert metrics["gradient_alignment"] == pytest.approx(expected.alignment, abs=1e-12)
        # ‖ζ‖ is read off the shifted weights, where rounding hides its last digits.
        assert metrics.get("extrapolation_size", 0.0) == pytest.approx(
            expected.relative_size, rel=1e-9
        )

        # METHOD's formulas, with b and B = K·b in samples; a moving average with decay 0.99 of
        # each.
        b, large = task.worker_batch_size, task.batch_size
        squared_gradient = (large * expected.squared_norm_of_mean - b * mean_squared_norm) / (
            large - b
        )
        noise_trace = (mean_squared_norm - expected.squared_norm_of_mean) / (1 / b - 1 / large)
        for name, value in (("squared_gradient", squared_gradient), ("noise_trace", noise_trace)):
            noise_scale[name] = 0.99 * noise_scale[name] + 0.01 * value
            assert getattr(run.noise_scale, name) == pytest.approx(noise_scale[name], rel=1e-9)

    train_watched(run, compare)

    assert len(factors) == steps
    assert run.gradient_evaluations == reference.gradients_taken * task.worker_batch_size
    # The comparison is worth something only if the shift, and where it is asked for the clipping,
    # were there.
    if zeta.name != "none":
        assert (
            min(shift for step, shift in enumerate(shifts) if zeta.acts_in(step) and step > 0)
            > 1e-5
        )
    if base.clip_norm is not None:
        assert min(factors) < 0.95
        assert max(factors) == 1.0


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# ---------------------------------------------------------------------------------------------
# Promises that every direction keeps, in a loop that a user would write

DIRECTIONS: dict[str, Direction] = {
    "local-ratio": LocalGradient(ratio=0.5),
    "local-rate": LocalGradient(rate=0.1),
    "local-layer": LocalGradient(size=0.1, scaling="layer"),
    "local-filter": LocalGradient(size=0.1, scaling="filter"),
    "optimistic-ratio": OptimisticGradient(ratio=0.5),
    "optimistic-filter": OptimisticGradient(size=0.1, scaling="filter"),
    "gradient-noise-ratio": GradientNoise(ratio=0.5),
    "gradient-noise-layer": GradientNoise(size=0.1, scaling="layer"),
    "extragradient-ratio": Extragradient(ratio=0.5),
    "extragradient-filter": Extragradient(size=0.1, scaling="filter"),
    "sam": SAM(radius=0.1),
    "msam": MSAM(radius=0.1),
    "nesterov": Nesterov(),
    "average-of-updates": AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.1),
    "average-of-gradients": AverageOfGradients(ratio=0.5, decay=0.6),
    "gaussian-none": GaussianNoise(size=0.1, scaling="none", norm_and_bias=True),
    "gaussian-filter": GaussianNoise(size=0.1, norm_and_bias=True),
    "smoothout-layer": SmoothOut(size=0.1, scaling="layer", norm_and_bias=True),
}


def test_every_choice_of_the_configuration_is_in_both_tables() -> None:
    assert SECTIONS.keys() - {zeta.name for zeta, _, _ in ROWS} == set()
    classes = {type(direction).__name__ for direction in DIRECTIONS.values()}
    assert {row.direction for row in CHOICES if row.direction} - classes == set()


every_direction = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS.keys())
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)

WORKERS = 3


class Problem(nn.Module):
    """A loss of every kind of parameter; `data` has one number a worker and step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.matrix = nn.Parameter(
            torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.kernel = nn.Parameter(
            torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.vector = nn.Parameter(
            torch.randn(6, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.scalar = nn.Parameter(torch.tensor(1.25, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, 3, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((2, 2), 0.5, dtype=dtype), requires_grad=False)

    def used(self) -> list[nn.Parameter]:
        return [self.matrix, self.kernel, self.vector, self.scalar]

    def forward(self, data: float) -> Tensor:
        losses = [
            (torch.cos(data + p) * (1 + 0.1 * data)).sum() + 0.1 * p.square().sum()
            for p in self.used()
        ]
        return torch.stack(losses).sum() * (1 + 0.1 * self.frozen.sum())


class UserLoop:
    """A model, a base optimizer with two rates, and extrapolation, without egtrain's engine."""

    def __init__(
        self,
        direction: Direction,
        dtype: torch.dtype = torch.float64,
        workers: int | range = WORKERS,
    ):
        self.model = Problem(dtype)
        m = self.model
        self.optimizer = torch.optim.SGD(
            [
                {"params": [m.matrix, m.frozen, m.vector], "lr": 0.1},
                {"params": [m.kernel, m.scalar, m.unused], "lr": 0.02, "weight_decay": 0.1},
            ],
            lr=0.1,
            momentum=0.9,
            nesterov=not isinstance(direction, MSAM | Nesterov),
        )
        self.extrapolation = Extrapolation(self.optimizer, direction, workers, seed=5)
        self.step_number = 0

    def backward(self, worker: int) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model(0.3 * worker + 0.7 * self.step_number))

    def shifted(self, worker: int = 0) -> Any:
        return self.extrapolation.shifted(worker, gradient=lambda: self.backward(worker))

    def step(self, clip: float | None = None) -> None:
        gradients: list[list[Tensor]] = []
        for worker in self.extrapolation.workers:
            with self.shifted(worker):
                self.backward(worker)
            gradients.append([p.grad.clone() for p in self.model.used() if p.grad is not None])
        for p, *parts in zip(self.model.used(), *gradients, strict=True):
            p.grad = torch.stack(parts).mean(dim=0)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.step_number += 1

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def shift(self, worker: int = 0) -> dict[str, Tensor]:
        """Return ζ of each parameter, as far as the weights show it, and leave no trace."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        memory = self.extrapolation.state_dict()
        with self.shifted(worker):
            shift = {name: before[name] - p.detach() for name, p in self.model.named_parameters()}
            self.backward(worker)
        self.extrapolation.load_state_dict(memory)
        return shift

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "extrapolation": self.extrapolation.state_dict(),
            "step": self.step_number,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.extrapolation.load_state_dict(state["extrapolation"])
        self.step_number = state["step"]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two lists are equal bit for bit."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)
        for x, y in zip(a, b, strict=True)
    )


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


@every_direction
@every_dtype
def test_everything_keeps_its_type(direction: Direction, dtype: torch.dtype) -> None:
    loop = UserLoop(direction, dtype)
    for _ in range(3):
        loop.step(clip=1.0)
    before = loop.weights()
    with loop.shifted(1):
        inside = loop.weights()
        loop.backward(1)
    assert {p.dtype for p in loop.model.parameters()} == {dtype}
    assert {p.grad.dtype for p in loop.model.parameters() if p.grad is not None} == {dtype}
    state = loop.extrapolation.state_dict()
    assert {t.dtype for t in tensors_in([state["worker_state"], state["shared_state"]])} <= {dtype}
    assert all(torch.isfinite(x).all() for x in inside)
    assert not same(inside, before)
    assert same(loop.weights(), before)


@every_direction
def test_parameters_of_several_types_share_an_optimizer(direction: Direction) -> None:
    wide = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    narrow = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(torch.bfloat16))
    optimizer = torch.optim.SGD([wide, narrow], lr=0.1, momentum=0.9)
    extrapolation = Extrapolation(optimizer, direction)

    def backward() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(torch.cos(wide).sum() + torch.cos(narrow).float().sum())

    for _ in range(3):
        with extrapolation.shifted(gradient=backward):
            backward()
        optimizer.step()
    assert [p.dtype for p in (wide, narrow)] == [torch.float32, torch.bfloat16]
    assert torch.isfinite(wide).all()
    assert torch.isfinite(narrow).all()


@every_direction
def test_the_weights_come_back_bit_for_bit(direction: Direction) -> None:
    loop = UserLoop(direction, torch.float32)
    for _ in range(3):
        loop.step()
        for worker in range(WORKERS):
            before = loop.weights()
            with loop.shifted(worker):
                assert not same(loop.weights(), before)
                loop.backward(worker)
            assert same(loop.weights(), before)
        loop.extrapolation.skip_update()


@every_direction
def test_an_exception_in_the_block_leaves_no_trace(direction: Direction) -> None:
    loop = UserLoop(direction, torch.float32)
    loop.step()
    before, memory = loop.weights(), list(tensors_in(loop.extrapolation.state_dict()))

    def fail_halfway() -> None:
        with loop.shifted(1):
            loop.backward(1)
            raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        fail_halfway()
    assert same(loop.weights(), before)
    assert same(list(tensors_in(loop.extrapolation.state_dict())), memory)
    undisturbed = UserLoop(direction, torch.float32)
    undisturbed.step()
    loop.step()
    undisturbed.step()
    assert same(loop.weights(), undisturbed.weights())


@every_direction
def test_a_ctrl_c_while_the_weights_are_shifted_leaves_no_trace(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = UserLoop(direction, torch.float32)
    loop.step()
    before = loop.weights()
    subtract = torch._foreach_sub_

    def interrupted(weights: list[Tensor], zeta: list[Tensor]) -> None:
        subtract(weights, zeta)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_sub_", interrupted)
        with pytest.raises(KeyboardInterrupt), loop.shifted(1):
            pass
    assert same(loop.weights(), before)
    loop.step()


@pytest.mark.parametrize(
    "length", [{"ratio": 0.5}, {"rate": 0.03}, {"size": 0.1, "scaling": "layer"}]
)
def test_a_clipped_past_gradient_is_scaled_in_every_group_at_its_own_rate(
    length: dict[str, Any],
) -> None:
    plain, clipped = UserLoop(LocalGradient(**length)), UserLoop(LocalGradient(**length))
    plain.step()
    norm = torch.cat([p.grad.flatten() for p in plain.model.used() if p.grad is not None]).norm()
    clipped.step(clip=0.25 * norm.item())
    clipped.load({**clipped.state(), "model": plain.model.state_dict()})
    # Where a size sets the length, how long the gradient is makes no difference.
    factor = 1.0 if "size" in length else 0.25
    for before, after in zip(plain.shift().values(), clipped.shift().values(), strict=True):
        torch.testing.assert_close(after, factor * before, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("row", [LocalGradient, GradientNoise])
def test_a_gradient_below_the_limit_is_as_without_one(row: Any) -> None:
    clipping, not_clipping = UserLoop(row(ratio=0.5)), UserLoop(row(ratio=0.5))
    for _ in range(3):
        clipping.step(clip=1e9)
        not_clipping.step()
    torch.testing.assert_close(clipping.weights(), not_clipping.weights(), rtol=1e-15, atol=0)


@every_direction
def test_an_update_that_is_left_out_leaves_no_trace(direction: Direction) -> None:
    undisturbed, loop = UserLoop(direction), UserLoop(direction)
    for other in (undisturbed, loop):
        other.step()
    for worker in range(WORKERS):
        with loop.shifted(worker):
            loop.optimizer.zero_grad()
            torch.autograd.backward(loop.model(float("nan")))
    loop.extrapolation.skip_update()
    for other in (undisturbed, loop):
        other.step()
    assert same(loop.weights(), undisturbed.weights())


@every_direction
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_saved_state_resumes_bit_for_bit(direction: Direction, clip: float | None) -> None:
    undisturbed = UserLoop(direction)
    for _ in range(3):
        undisturbed.step(clip)
    file = io.BytesIO()
    torch.save(undisturbed.state(), file)
    for _ in range(3):
        undisturbed.step(clip)

    file.seek(0)
    resumed = UserLoop(direction)
    resumed.load(torch.load(file, weights_only=True))
    assert resumed.extrapolation.steps == 3
    for _ in range(3):
        resumed.step(clip)
    assert same(resumed.weights(), undisturbed.weights())


@every_direction
def test_a_state_is_a_copy(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step(clip=1.0)
    state = loop.extrapolation.state_dict()
    kept = [t.clone() for t in tensors_in(state)]
    loop.step(clip=0.5)
    assert same(list(tensors_in(state)), kept)


@pytest.mark.parametrize(
    ("zeta", "direction", "base"),
    [
        row
        for row in ROWS
        if row[0].until > 100
        and (row[2] == NESTEROV or row[0].name in ("none", "msam", "nesterov"))
    ],
    ids=row_name,
)
def test_a_run_resumes_bit_for_bit(zeta: Zeta, direction: Direction | None, base: Base) -> None:
    def run() -> Any:
        return tiny_run(
            direction,
            base,
            workers=2,
            dtype=torch.float32,
            steps=6,
            new_samples=zeta.samples == "new",
        )

    undisturbed = run()
    file = io.BytesIO()
    losses: list[float] = []

    def save_in_the_middle(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        if step == 3:
            torch.save(undisturbed.state_dict(), file)

    train_watched(undisturbed, save_in_the_middle)
    file.seek(0)
    resumed = run()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed_losses: list[float] = []
    train_watched(resumed, lambda step, metrics: resumed_losses.append(metrics["loss"]))
    assert resumed_losses == losses[3:]
    assert same([resumed.workers.parameters], [undisturbed.workers.parameters])
    assert same(
        [*tensors_in(resumed.workers.state_dict())], [*tensors_in(undisturbed.workers.state_dict())]
    )
    assert same(
        [*tensors_in(resumed.optimizer.state_dict())],
        [*tensors_in(undisturbed.optimizer.state_dict())],
    )
    assert resumed.noise_scale == undisturbed.noise_scale


@pytest.mark.parametrize(
    ("other", "workers", "what"),
    [
        (
            OptimisticGradient(ratio=0.5),
            3,
            "belongs to other parameters, workers or another direction",
        ),
        (GradientNoise(ratio=0.5), 3, "belongs to other parameters, workers or another direction"),
        (GaussianNoise(size=0.1), 3, "belongs to other parameters, workers or another direction"),
        (
            LocalGradient(ratio=0.5),
            2,
            r"that of workers \[0, 1, 2\], but this process has \[0, 1\]",
        ),
        (
            LocalGradient(ratio=0.5),
            range(3, 6),
            r"this process has \[3, 4, 5\]: let each process load the state that it saved",
        ),
    ],
    ids=[
        "another direction",
        "more state",
        "less state",
        "fewer workers",
        "those of another process",
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    other: Direction, workers: int | range, what: str
) -> None:
    loop = UserLoop(LocalGradient(ratio=0.5))
    loop.step()
    with pytest.raises(ValueError, match=what):
        UserLoop(other, workers=workers).extrapolation.load_state_dict(
            loop.extrapolation.state_dict()
        )


@every_direction
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))])
def test_a_copy_goes_on_by_itself(
    direction: Direction, copied: Callable[[UserLoop], UserLoop]
) -> None:
    original = UserLoop(direction)
    original.step()
    copy_of_it = copied(original)
    for _ in range(3):
        original.step()
    before = original.weights()
    for _ in range(3):
        copy_of_it.step()
    assert same(copy_of_it.weights(), before)
    assert same(original.weights(), before)
    assert copy_of_it.extrapolation.steps == original.extrapolation.steps == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))])
def test_a_copy_keeps_the_weights_itself_where_the_caller_kept_the_originals(
    copied: Callable[[Any], Any],
) -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weights], lr=0.5)
    extrapolation = Extrapolation(
        optimizer, LocalGradient(ratio=0.5), unshifted={weights: torch.ones(3)}
    )
    _, copy_of_it = copied((optimizer, extrapolation))
    (weights,) = copy_of_it.parameters
    with torch.no_grad():
        weights.fill_(7)
    with copy_of_it.shifted():
        torch.autograd.backward(weights.square().sum())
    assert weights.tolist() == [7, 7, 7]


# Awkward parameters


def test_the_shift_is_the_ratio_times_each_groups_rate_times_the_own_gradient() -> None:
    loop = UserLoop(LocalGradient(ratio=0.5))
    own = []
    for worker in range(WORKERS):
        with loop.shifted(worker):
            loop.backward(worker)
        own.append(
            {n: p.grad.clone() for n, p in loop.model.named_parameters() if p.grad is not None}
        )
    loop.extrapolation.averaged()  # so that it is not taken for clipped
    loop.optimizer.step()
    # As a schedule does: the rate of the step that is being made counts. A resumed optimizer has
    # new groups.
    loop.shift()
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())
    for rate, other_rate in [(0.1, 0.02), (0.01, 0.02), (0.01, 0.3)]:
        loop.optimizer.param_groups[0]["lr"], loop.optimizer.param_groups[1]["lr"] = (
            rate,
            other_rate,
        )
        for worker in range(WORKERS):
            shift = loop.shift(worker)
            for name, r in {
                "matrix": rate,
                "vector": rate,
                "kernel": other_rate,
                "scalar": other_rate,
            }.items():
                torch.testing.assert_close(
                    shift[name], 0.5 * r * own[worker][name], rtol=1e-9, atol=1e-14
                )


@every_direction
def test_frozen_and_unused_parameters_stay_out_of_it(direction: Direction) -> None:
    loop = UserLoop(direction)
    for _ in range(2):
        loop.step()
    for worker in range(WORKERS):
        shift = loop.shift(worker)
        assert not shift["frozen"].any()
        # Without a gradient there is no direction; noise needs none.
        assert bool(shift["unused"].any()) == isinstance(direction, GaussianNoise | SmoothOut)
        assert all(shift[name].any() for name in ("matrix", "kernel", "vector", "scalar"))
    assert loop.model.unused.grad is None
    assert loop.model.frozen.grad is None


@every_direction
def test_a_parameter_may_be_frozen_later(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step()
    loop.model.unused.requires_grad_(False)
    loop.step()
    loop.step()


@every_direction
@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_later_parameters_are_taken_up_as_if_new(direction: Direction, how: str) -> None:
    loop, fresh = UserLoop(direction), UserLoop(direction)
    loop.step()
    kept = loop.shift()
    added = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
    if how == "unfrozen":
        loop.model.frozen.requires_grad_(True)
    else:
        loop.optimizer.add_param_group({"params": [added]})
        loop.model.register_parameter("added", added)
    name = "frozen" if how == "unfrozen" else "added"
    shift = loop.shift()
    if isinstance(direction, LocalGradient | OptimisticGradient | MSAM):
        assert not shift[name].any()
        assert all(torch.equal(shift[n], z) for n, z in kept.items())
    loop.step()
    loop.step()
    assert len(loop.extrapolation.parameters) == len(fresh.extrapolation.parameters) + 1


@every_direction
def test_a_whole_group_may_have_no_gradient_but_not_all(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step()
    before, memory = loop.weights(), list(tensors_in(loop.extrapolation.state_dict()))
    loop.optimizer.zero_grad()
    with (
        pytest.raises(
            RuntimeError,
            match=r"no parameter has a gradient after gradient\(\)"
            if direction.gradients == 2
            else r"no parameter has a gradient: backward\(\) belongs ins",
        ),
        loop.extrapolation.shifted(0, gradient=loop.model.zero_grad),
    ):
        pass
    assert same(loop.weights(), before)
    assert same(list(tensors_in(loop.extrapolation.state_dict())), memory)

    def gradient_of_one_group() -> None:
        loop.model.matrix.grad = torch.ones_like(loop.model.matrix)

    with loop.extrapolation.shifted(0, gradient=gradient_of_one_group):
        gradient_of_one_group()
    loop.optimizer.step()


def test_a_parameter_that_got_no_gradient_has_no_past() -> None:
    weights, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weights, other], lr=0.25)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5))
    with extrapolation.shifted():
        torch.autograd.backward(weights.sum())
    optimizer.step()
    optimizer.zero_grad()
    with extrapolation.shifted():
        assert torch.equal(weights, torch.full((3,), 0.75 - 0.125))
        torch.autograd.backward(other.sum())
    optimizer.step()
    with extrapolation.shifted():
        assert torch.equal(weights, torch.full((3,), 0.75))
        assert torch.equal(other, torch.full((3,), 0.75 - 0.125))
        torch.autograd.backward(other.sum())


# Workers, seeds and streams


@pytest.mark.parametrize("noise", NOISE_ROWS.values())
def test_noise_is_a_function_of_seed_worker_and_step_alone(noise: Any) -> None:
    def shifts(workers: int | range) -> dict[int, Tensor]:
        loop = UserLoop(noise(size=0.1), workers=workers)
        loop.extrapolation._updates.steps = 4
        torch.rand(len(loop.extrapolation.workers))
        return {k: loop.shift(k)["matrix"] for k in reversed(loop.extrapolation.workers)}

    everywhere, upper = shifts(6), shifts(range(3, 6))
    assert all(torch.equal(everywhere[k], upper[k]) for k in (3, 4, 5))
    assert len({bits(shift) for shift in everywhere.values()}) == 6


def test_noise_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    UserLoop(GaussianNoise(size=0.1)).shift()
    assert torch.equal(torch.rand(3), expected)


def test_noise_changes_with_every_step_and_seed() -> None:
    loop = UserLoop(GaussianNoise(size=0.1))
    first = loop.shift()["matrix"]
    assert torch.equal(loop.shift()["matrix"], first)
    loop.optimizer.zero_grad()
    loop.optimizer.step()  # Without gradients: the weights stay, the step is the next.
    assert not torch.equal(loop.shift()["matrix"], first)
    other = UserLoop(GaussianNoise(size=0.1))
    other.extrapolation.seed = 6
    assert not torch.equal(other.shift()["matrix"], first)


@pytest.mark.parametrize("noise", NOISE_ROWS.values())
def test_noise_is_drawn_in_one_go_in_whatever_order_the_weights_lie(noise: Any) -> None:
    """Drawn number by number, as torch does into channels-last weights, Gaussian noise costs 4 % of
    a step.
    """
    drawn = []
    for like in (
        torch.zeros(6 * 5 * 9),
        torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last),
    ):
        weights = nn.Parameter(like)
        direction = noise(size=1.0, scaling="none", norm_and_bias=True)
        extrapolation = Extrapolation(torch.optim.SGD([weights], lr=0.1), direction)
        with extrapolation.shifted():
            drawn.append(weights.detach().clone().as_strided((6 * 5 * 9,), (1,)))
            weights.grad = torch.zeros_like(weights)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("scaling", ["layer", "filter"])
@pytest.mark.parametrize("noise", NOISE_ROWS.values())
def test_noise_leaves_out_norms_and_biases_unless_asked(noise: Any, scaling: Any) -> None:
    shift = UserLoop(noise(size=0.1, scaling=scaling)).shift()
    assert shift["matrix"].any()
    assert not shift["vector"].any()
    assert not shift["scalar"].any()


@pytest.mark.parametrize("noise", NOISE_ROWS.values())
def test_noise_has_the_distribution_of_its_name(noise: Any) -> None:
    weights = nn.Parameter(torch.zeros(400, 500, dtype=torch.float64))
    direction = noise(size=2.0, scaling="none")
    extrapolation = Extrapolation(torch.optim.SGD([weights], lr=0.1), direction)
    with extrapolation.shifted():
        drawn = weights.detach() / 2.0
        weights.grad = torch.zeros_like(weights)
    variance, fourth = {GaussianNoise: (1.0, 3.0), SmoothOut: (1 / 3, 1 / 5)}[noise]
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.square().mean()) == pytest.approx(variance, rel=0.02)
    assert float(drawn.pow(4).mean()) == pytest.approx(fourth, rel=0.04)


@pytest.mark.parametrize("scaling", ["layer", "filter"])
@pytest.mark.parametrize(
    "direction",
    [
        LocalGradient,
        OptimisticGradient,
        Extragradient,
        lambda **size: GaussianNoise(norm_and_bias=True, **size),
    ],
    ids=["local", "optimistic", "extragradient", "noise"],
)
def test_size_is_relative_to_the_weights(direction: Callable[..., Direction], scaling: str) -> None:
    loop = UserLoop(direction(size=0.2, scaling=scaling))
    loop.step()
    weights = dict(loop.model.named_parameters())
    for name, shift in loop.shift(1).items():
        if name in ("matrix", "kernel", "vector", "scalar"):
            dims = tuple(range(1, shift.ndim)) if scaling == "filter" and shift.ndim > 1 else None
            found = torch.linalg.vector_norm(shift, dim=dims)
            torch.testing.assert_close(
                found,
                0.2 * torch.linalg.vector_norm(weights[name].detach(), dim=dims),
                rtol=1e-5,
                atol=0,
            )


# Autocast


@every_direction
def test_autocast_sees_the_shifted_weights(direction: Direction) -> None:
    model = nn.Linear(4, 3)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def backward() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(inputs).float().square().mean())

    # The local and the mean gradient have to differ for some.
    workers = 2 if isinstance(direction, GradientNoise) else 1
    extrapolation = Extrapolation(optimizer, direction, workers, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        for worker in range(workers):
            with extrapolation.shifted(worker, gradient=backward):
                torch.autograd.backward((1 + worker) * model(inputs).float().square().mean())
        optimizer.step()
        torch.clear_autocast_cache()
        before = model(inputs)
        with extrapolation.shifted(0, gradient=backward):
            assert not torch.equal(model(inputs), before)
            backward()
        assert torch.equal(model(inputs), before)


# What a user can do wrong


@every_direction
def test_blocks_cannot_be_nested(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step()
    before = loop.weights()
    with pytest.raises(RuntimeError, match="cannot be nested"), loop.shifted(), loop.shifted(1):
        pass
    assert same(loop.weights(), before)
    loop.step()


@every_direction
def test_the_optimizer_does_not_step_inside_the_block(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step()
    before, steps = loop.weights(), loop.extrapolation.steps
    with pytest.raises(RuntimeError, match="belongs after the shifted"), loop.shifted():
        loop.optimizer.step()
    assert same(loop.weights(), before)
    assert loop.extrapolation.steps == steps
    loop.step()


@every_direction
def test_backward_after_the_block_is_refused_by_autograd(direction: Direction) -> None:
    loop = UserLoop(direction)
    loop.step()
    with loop.shifted():
        loss = loop.model(0.5)
        loop.backward(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("worker", [-1, 0, 3, 7])
def test_an_unknown_worker_is_refused(worker: int) -> None:
    loop = UserLoop(LocalGradient(ratio=0.5), workers=range(4, 7))
    before = loop.weights()
    with (
        pytest.raises(ValueError, match=f"worker {worker} is not carried here"),
        loop.shifted(worker),
    ):
        pass
    assert same(loop.weights(), before)
    with loop.shifted(6):
        loop.backward(6)


@pytest.mark.parametrize("workers", [0, range(3, 3)])
def test_there_is_at_least_one_worker(workers: int | range) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        UserLoop(LocalGradient(ratio=0.5), workers=workers)


@every_direction
def test_sparse_gradients_are_refused_where_they_would_be_needed(direction: Direction) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    extrapolation = Extrapolation(optimizer, direction)
    before = embedding.weight.detach().clone()

    def step() -> None:
        def backward() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(embedding(torch.tensor([1, 2])).sum())

        with extrapolation.shifted(gradient=backward):
            backward()
        optimizer.step()

    state = extrapolation.state_dict()
    if not (state["worker_state"] or state["shared_state"] or direction.gradients == 2):
        step()
        assert not torch.equal(embedding.weight, before)
        return
    with pytest.raises(RuntimeError, match="dense gradients: use sparse=False"):
        step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize(
    "direction", [Extragradient(ratio=1), SAM(radius=0.1)], ids=["extragradient", "sam"]
)
def test_a_second_gradient_needs_a_function(direction: Direction) -> None:
    loop = UserLoop(direction)
    before = loop.weights()
    with (
        pytest.raises(ValueError, match=r"pass shifted\(\.\.\., gradient=function\)"),
        loop.extrapolation.shifted(0),
    ):
        pass
    assert same(loop.weights(), before)


@pytest.mark.parametrize(
    "direction", [Extragradient(ratio=1), SAM(radius=0.1)], ids=["extragradient", "sam"]
)
def test_the_second_gradient_is_not_added_to_the_first(direction: Direction) -> None:
    loop = UserLoop(direction)
    with loop.shifted():
        assert all(p.grad is not None and not p.grad.any() for p in loop.model.used())
        torch.autograd.backward(loop.model(0.3))
        found = [p.grad.clone() for p in loop.model.used() if p.grad is not None]
        assert same(found, list(torch.autograd.grad(loop.model(0.3), loop.model.used())))


@pytest.mark.parametrize(
    "direction", [LocalGradient, OptimisticGradient, GradientNoise, Extragradient]
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of ratio, rate and size"),
        ({"ratio": 0.1, "rate": 0.1}, "exactly one of ratio, rate and size"),
        ({"ratio": 0.1, "size": 0.1, "scaling": "layer"}, "exactly one of ratio, rate and size"),
        ({"rate": 0.1, "size": 0.1, "scaling": "filter"}, "exactly one of ratio, rate and size"),
        ({"scaling": "layer"}, "exactly one of ratio, rate and size"),
        ({"size": 0.1}, "size goes with scaling"),
        ({"ratio": 0.1, "scaling": "layer"}, "size goes with scaling"),
        ({"rate": 0.1, "scaling": "filter"}, "size goes with scaling"),
        (
            {"size": 0.1, "scaling": "layers"},
            "scaling must be one of none, layer, filter, not 'layers'",
        ),
        (
            {"ratio": 0.1, "precondition": "adam"},
            "precondition must be one of base, none, not 'adam'",
        ),
        ({"ratio": -0.1}, "ratio must be a finite number of at least 0"),
        ({"rate": float("nan")}, "rate must be a finite number of at least 0"),
        ({"size": float("inf"), "scaling": "layer"}, "size must be a finite number of at least 0"),
    ],
)
def test_lengths_that_do_not_go_together_are_refused(
    direction: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        direction(**settings)


@pytest.mark.parametrize("noise", NOISE_ROWS.values())
def test_noise_of_an_unknown_scaling_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        noise(size=0.1, scaling="Layer")


@pytest.mark.parametrize(
    "make",
    [lambda x: GaussianNoise(size=x), lambda x: SAM(radius=x), lambda x: MSAM(radius=x)],
    ids=["noise", "sam", "msam"],
)
@pytest.mark.parametrize("size", [-0.1, float("nan"), float("inf")])
def test_sizes_that_are_not_sizes_are_refused(
    make: Callable[[float], Direction], size: float
) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        make(size)


# What it costs


@pytest.mark.parametrize(
    ("direction", "buffers"),
    [
        (LocalGradient(ratio=0.5), WORKERS + 1),
        (LocalGradient(size=0.1, scaling="filter"), WORKERS + 1),
        (OptimisticGradient(ratio=0.5), 2),
        (GradientNoise(ratio=0.5), WORKERS + 2),
        (Extragradient(ratio=0.5), 1),
        (SAM(radius=0.1), 1),
        (MSAM(radius=0.1), 1),
        (Nesterov(), 1),
        (GaussianNoise(size=0.1), 1),
        (AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.1), 2),
    ],
    ids=[
        "local",
        "local-filter",
        "optimistic",
        "gradient-noise",
        "extragradient",
        "sam",
        "msam",
        "nesterov",
        "noise",
        "average-of-updates",
    ],
)
def test_it_keeps_one_buffer_a_worker_and_one_for_the_return(
    direction: Direction, buffers: int
) -> None:
    loop = UserLoop(direction)
    for _ in range(2):
        loop.step(clip=1.0)
    shifted = [p for p in loop.model.parameters() if p.requires_grad]
    weights = {p.untyped_storage().data_ptr() for p in shifted}
    e = loop.extrapolation
    parts = [e, e._kept, e._weights, e._updates, e._remembering]
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors_in([vars(part) for part in parts])
        if t.ndim > 0 or t.untyped_storage().nbytes() > 8
    }
    scalars = [p for p in shifted if p.ndim == 0]
    size = sum(p.numel() * p.element_size() for p in shifted) - 8 * len(scalars)
    assert sum(n for storage, n in kept.items() if storage not in weights) == buffers * size


def test_no_zeta_outlives_its_making() -> None:
    made: list[Any] = []

    class Watched(Direction):
        def zeta(self, at: Point) -> list[Tensor]:
            import weakref

            zeta = [torch.full_like(p, 0.1) for p in at.parameters]
            made.extend(weakref.ref(z) for z in zeta)
            return zeta

    loop = UserLoop(Watched())
    with loop.shifted():
        assert made
        assert all(reference() is None for reference in made)
        loop.backward(0)


def test_the_optim_package_needs_nothing_but_torch() -> None:
    code = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import egtrain.optim, egtrain.optim.schedules, egtrain.optim.noise_scale
brought = {name for name in sys.modules if name.startswith("egtrain")}
others = {name.partition(".")[0] for name in sys.modules} - before
others -= {*sys.stdlib_module_names, "egtrain"}
assert all(name == "egtrain" or name.startswith("egtrain.optim") for name in brought), brought
assert not others, others
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_the_docstring_example_works() -> None:
    import egtrain.optim

    lines = [
        line[4:]
        for line in (egtrain.optim.__doc__ or "").splitlines()
        if line.startswith((">>> ", "... "))
    ]
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    example = {
        "torch": torch,
        "model": model,
        "inputs": torch.randn(4, 3),
        "targets": torch.randn(4, 2),
        "loss_function": nn.functional.mse_loss,
        **vars(egtrain.optim),
    }
    exec("\n".join(lines), example)
    assert not torch.equal(model.weight, before)
    assert isinstance(example["extrapolation"], Extrapolation)
    assert example["extrapolation"].steps == 1


# Scaling by hand


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", [[[0.5 * 3.0, 0.5 * 4.0], [0.0, 0.5 * 2.0]], [0.5 * 6.0, 0.5 * 8.0]]),
        (
            "layer",
            [
                [[0.5 * x * 50**0.5 / 29**0.5 for x in (3.0, 4.0)], [0.0, 50**0.5 / 29**0.5]],
                [0.3, 0.4],
            ],
        ),
        ("filter", [[[0.5 * 5.0 * 0.6, 0.5 * 5.0 * 0.8], [0.0, 0.5 * 5.0]], [0.3, 0.4]]),
    ],
)
def test_scaling_by_hand(scaling: Any, expected: list[Any]) -> None:
    zeta = [torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([6.0, 8.0])]
    weights = [torch.tensor([[5.0, 0.0], [3.0, 4.0]]), torch.tensor([0.6, 0.8])]
    found = scaled_to_weights(zeta, weights, 0.5, scaling)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, torch.tensor(e))


def test_a_gradient_of_rounding_errors_is_not_blown_up_to_full_size() -> None:
    (shift,) = scaled_to_weights([torch.full((3, 3), 1e-10)], [torch.ones(3, 3)], 0.5, "layer")
    assert shift.norm() < 0.5 * 3 * 1e-3


def test_a_zero_gradient_in_half_precision_scales_to_zero() -> None:
    (shift,) = scaled_to_weights(
        [torch.zeros(64, 64).half()], [torch.ones(64, 64).half()], 0.5, "layer"
    )
    assert torch.equal(shift, torch.zeros(64, 64).half())
