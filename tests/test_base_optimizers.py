"""What a shift takes from its base optimizer: the scale of a gradient, the momentum, and whether
the optimizer keeps them at all.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from egtrain.optim import (
    LAMB,
    LARS,
    MSAM,
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    LocalGradient,
    Nesterov,
    Point,
    base_scales,
    scaled_to_weights,
    second_moments,
)
from egtrain.optim.base_state import BaseState

Make = Callable[[Any], torch.optim.Optimizer]
o = torch.optim

STEADY: dict[str, Make] = {
    "SGD": lambda p: o.SGD(p, 0.1),
    "SGD foreach": lambda p: o.SGD(p, 0.1, foreach=True),
    "SGD fused": lambda p: o.SGD(p, 0.1, fused=True),
    "ASGD": lambda p: o.ASGD(p, 0.1, lambd=0.7, alpha=0.6),
    "ASGD foreach": lambda p: o.ASGD(p, 0.1, lambd=0.7, alpha=0.6, foreach=True),
    "Adam": lambda p: o.Adam(p, 0.1, eps=0.1),
    "Adam foreach": lambda p: o.Adam(p, 0.1, eps=0.1, foreach=True),
    "Adam fused": lambda p: o.Adam(p, 0.1, eps=0.1, fused=True),
    "Adam amsgrad": lambda p: o.Adam(p, 0.1, eps=0.1, amsgrad=True),
    "Adam amsgrad foreach": lambda p: o.Adam(p, 0.1, eps=0.1, amsgrad=True, foreach=True),
    "Adam amsgrad fused": lambda p: o.Adam(p, 0.1, eps=0.1, amsgrad=True, fused=True),
    "AdamW": lambda p: o.AdamW(p, 0.1, eps=0.1, weight_decay=0),
    "AdamW fused": lambda p: o.AdamW(p, 0.1, eps=0.1, weight_decay=0, fused=True),
    "AdamW amsgrad": lambda p: o.AdamW(p, 0.1, eps=0.1, weight_decay=0, amsgrad=True),
    "NAdam": lambda p: o.NAdam(p, 0.1, (0.02, 0.99), eps=0.1, momentum_decay=0),
    "NAdam foreach": lambda p: o.NAdam(
        p, 0.1, (0.02, 0.99), eps=0.1, momentum_decay=0, foreach=True
    ),
    "RAdam": lambda p: o.RAdam(p, 0.1, eps=0.1),
    "RAdam foreach": lambda p: o.RAdam(p, 0.1, eps=0.1, foreach=True),
    "RAdam never rectified": lambda p: o.RAdam(p, 0.1, (0.9, 0.6), eps=0.1),
    "Adamax": lambda p: o.Adamax(p, 0.1, eps=0.1),
    "Adamax foreach": lambda p: o.Adamax(p, 0.1, eps=0.1, foreach=True),
    "Adagrad": lambda p: o.Adagrad(p, 0.1, eps=0.1, lr_decay=0.3, initial_accumulator_value=0.2),
    "Adagrad foreach": lambda p: o.Adagrad(p, 0.1, eps=0.1, lr_decay=0.3, foreach=True),
    "Adagrad fused": lambda p: o.Adagrad(p, 0.1, eps=0.1, lr_decay=0.3, fused=True),
    "Adadelta": lambda p: o.Adadelta(p, 0.1, rho=0.05, eps=0.1),
    "Adadelta foreach": lambda p: o.Adadelta(p, 0.1, rho=0.05, eps=0.1, foreach=True),
    "RMSprop": lambda p: o.RMSprop(p, 0.1, eps=0.1),
    "RMSprop foreach": lambda p: o.RMSprop(p, 0.1, eps=0.1, foreach=True),
    "RMSprop centered": lambda p: o.RMSprop(p, 0.1, eps=0.1, centered=True),
    "RMSprop centered foreach": lambda p: o.RMSprop(p, 0.1, eps=0.1, centered=True, foreach=True),
    "Adafactor": lambda p: o.Adafactor(p, 0.1),
    "Adafactor foreach": lambda p: o.Adafactor(p, 0.1, foreach=True),
    "Adafactor at a high rate": lambda p: o.Adafactor(p, 0.5, eps=(1e-3, 2.0), d=1.5),
    "LARS": lambda p: LARS(p, 0.1, momentum=0.0, adapt_norm_and_bias=True),
    "LARS without biases": lambda p: LARS(p, 0.1, momentum=0.0),
    "LAMB": lambda p: LAMB(p, 0.1, eps=0.1),
}
"""Settings whose momentum is steady after 12 equal gradients."""
ITS_SCALE_IS_THAT_OF_THE_NEXT_STEP = ("ASGD", "Adadelta")
"""They change it at the end of a step."""


def point(base: BaseState, parameters: list[Tensor], **known: Any) -> Point:
    """Return the point at which a direction is evaluated."""
    groups = [g for g in base.optimizer.param_groups for _ in g["params"]]
    settings: dict[str, Any] = {
        "worker": 0,
        "step": base.updates,
        "parameters": parameters,
        "learning_rates": [float(g["lr"]) for g in groups],
        "state": {},
        "shared": {},
        "second_gradient": [],
        "clip_factor": None,
        "base": base,
        "seed": 0,
    }
    return Point(**{**settings, **known})


def base_state(optimizer: torch.optim.Optimizer, *, updates: int = 1) -> BaseState:
    """Return the state of an optimizer's parameters."""
    groups = [(i, p) for i, g in enumerate(optimizer.param_groups) for p in g["params"]]
    base = BaseState(optimizer, [p for _, p in groups], [i for i, _ in groups])
    base.updates = updates
    return base


@torch.no_grad()
def step_and_shift(
    make: Make, gradients: list[Tensor], *, weights: float, updates: int = 12
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the last step, the shift after it at ratio 1, and the step that follows; without
    updates, the last step is the one that follows.

    The weights are put back before each step, so that trust ratios are steady too.
    """
    parameters: list[Tensor] = [nn.Parameter(torch.full_like(g, weights)) for g in gradients]
    half = len(parameters) // 2
    optimizer = make([{"params": parameters[:half]}, {"params": parameters[half:]}])
    optimizer.param_groups[1]["lr"] /= 2
    base = base_state(optimizer, updates=updates)
    steps: list[list[Tensor]] = []
    for step in range(updates + 1):
        for p, g in zip(parameters, gradients, strict=True):
            p.fill_(weights)
            p.grad = g.clone()
        if step == updates:
            at = point(base, parameters, second_gradient=gradients)
            shift = Extragradient(ratio=1.0).zeta(at)
        optimizer.step()
        steps.append([weights - p for p in parameters])
    return steps[updates - 1], shift, steps[updates]


def some_gradients(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = [(3, 4), (2, 3, 2), (5,), (6, 2), (4,), (1,)]
    return [torch.randn(s, dtype=dtype, generator=random) for s in shapes]


# ---------------------------------------------------------------------------------------------
# The scale of a gradient


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        (name, updates)
        for name in STEADY
        for updates in (1, 3, 12, 40)
        if updates >= 12 or not name.startswith(("Adadelta", "NAdam"))  # not steady before
    ],
)
def test_for_a_steady_gradient_the_shift_is_the_step(name: str, updates: int) -> None:
    # ASGD has a decay of its own, which zero weights do not feel.
    last, shift, following = step_and_shift(
        STEADY[name],
        some_gradients(),
        weights=0.0 if name.startswith("ASGD") else 0.8,
        updates=updates,
    )
    step = following if name.startswith(ITS_SCALE_IS_THAT_OF_THE_NEXT_STEP) else last
    for zeta, moved in zip(shift, step, strict=True):
        assert float(moved.norm()) > 0
        # Some keep rates in single precision.
        torch.testing.assert_close(zeta, moved, rtol=1e-6, atol=0)


def test_the_table_of_steady_gradients_has_every_optimizer_whose_scale_is_known() -> None:
    made = {type(make([nn.Parameter(torch.ones(2, 2))])) for make in STEADY.values()}
    assert made | {o.Muon} == set(base_scales.SCALES)


def test_the_page_on_base_optimizers_names_every_one_whose_scale_is_known() -> None:
    page = (Path(__file__).parents[1] / "docs" / "base-optimizers.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "".join(cells)))
    assert named == {kind.__name__ for kind in base_scales.SCALES}


@pytest.mark.parametrize("updates", [5, 6])
def test_radam_is_plain_until_it_is_rectified(updates: int) -> None:
    gradients = some_gradients()
    _, shift, _ = step_and_shift(STEADY["RAdam"], gradients, weights=0.8, updates=updates)
    assert torch.allclose(shift[0], 0.1 * gradients[0]) == (updates == 5)


@pytest.mark.parametrize(
    "adjusts", [None, "original", "match_rms_adamw"], ids=["default", "original", "adamw"]
)
@pytest.mark.parametrize(
    ("coefficients", "precise_to"),
    [
        # Newton's own iteration ends at a semi-orthogonal matrix, in bfloat16.
        ({"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}, 0.02),
        ({}, 0.25),
    ],
    ids=["converged", "default"],
)
def test_with_muon_the_shift_is_the_gradient_as_long_as_the_step(
    adjusts: str | None, coefficients: dict[str, Any], precise_to: float
) -> None:
    gradients = [g for g in some_gradients() if g.ndim == 2] + [torch.zeros(2, 2).double()]
    last, shift, _ = step_and_shift(
        lambda p: o.Muon(p, 0.1, weight_decay=0, adjust_lr_fn=adjusts, **coefficients),
        gradients,
        weights=0.8,
    )
    for zeta, step, g in zip(shift[:2], last, gradients, strict=False):
        assert float(zeta.norm() / step.norm()) == pytest.approx(1, abs=precise_to)
        torch.testing.assert_close(zeta / zeta.norm(), g / g.norm())
    assert not shift[2].any()


@pytest.mark.parametrize("name", ["Adam", "Adam amsgrad", "RAdam", "Adagrad", "ASGD", "LAMB"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_counts_that_are_on_a_device_give_the_same_scale(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = some_gradients(dtype)
    _, expected, _ = step_and_shift(STEADY[name], gradients, weights=0.8)
    for module in (second_moments, base_scales):
        monkeypatch.setattr(module, "factors", lambda values: list(values.unbind()))
    _, shift, _ = step_and_shift(STEADY[name], gradients, weights=0.8)
    torch.testing.assert_close(shift, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEADY)
def test_shifts_keep_the_type_of_the_weights(name: str, dtype: torch.dtype) -> None:
    gradients = some_gradients(torch.float32)
    exact = step_and_shift(STEADY[name], gradients, weights=0.8)[1]
    shift = step_and_shift(STEADY[name], [g.to(dtype) for g in gradients], weights=0.8)[1]
    for zeta, right in zip(shift, exact, strict=True):
        assert zeta.dtype == dtype
        torch.testing.assert_close(zeta.float(), right, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("name", STEADY)
def test_before_an_update_a_shift_is_zero_or_that_of_a_first_step(name: str) -> None:
    gradients = some_gradients()
    _, shift, first = step_and_shift(
        STEADY[name], gradients, weights=0.0 if name.startswith("ASGD") else 0.8, updates=0
    )
    known = name.startswith(("SGD", "ASGD", "RAdam", "LARS"))
    rates = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05]
    for zeta, step, g, rate in zip(shift, first, gradients, rates, strict=True):
        torch.testing.assert_close(zeta, rate * g if known else torch.zeros_like(g))
        if known and not name.startswith("LARS"):  # whose trust ratio is one until it has made one
            torch.testing.assert_close(zeta, step)


@pytest.mark.parametrize("name", ["Adafactor", "LARS", "LAMB", "Adam"])
def test_with_a_size_factors_of_whole_layers_are_left_out(name: str) -> None:
    parameters = [nn.Parameter(torch.full_like(g, 0.8)) for g in some_gradients()]
    optimizer = STEADY[name](parameters)
    for _ in range(3):
        for p, g in zip(parameters, some_gradients(), strict=True):
            p.grad = g
        optimizer.step()
    base = base_state(optimizer)
    with torch.no_grad():
        of_layers, without = (
            base.preconditioned(some_gradients(), of_layers=wanted) for wanted in (True, False)
        )
    for with_factors, zeta in zip(of_layers, without, strict=True):
        factor = with_factors / zeta
        torch.testing.assert_close(factor, factor.flatten()[0].expand_as(factor))
    differs = [not torch.equal(a, b) for a, b in zip(of_layers, without, strict=True)]
    assert any(differs) == (name != "Adam")


def test_a_small_trust_ratio_does_not_shorten_a_shift_of_given_size() -> None:
    weights = nn.Parameter(torch.full((2, 2), 3.0).double())
    optimizer = LARS([weights], 0.1, trust_coefficient=1e-9)
    weights.grad = torch.full((2, 2), 2.0).double()
    optimizer.step()
    gradients = [torch.full((2, 2), 2.0).double()]
    at = point(base_state(optimizer), [weights], second_gradient=gradients)
    with torch.no_grad():
        (zeta,) = Extragradient(size=0.5, scaling="layer").zeta(at)
    assert float(zeta.norm()) == pytest.approx(0.5 * 6, rel=1e-5)


class MyAdam(torch.optim.Adam):
    """May make any step."""


class Foreign(torch.optim.Optimizer):
    """Another library's optimizer, with the names that torch's Adam uses."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Make a step."""


ForeignLARS = type("LARS", (Foreign,), {})

UNKNOWN: dict[str, Make] = {
    "torch.optim.rprop.Rprop": lambda p: o.Rprop(p),
    "torch.optim.lbfgs.LBFGS": lambda p: o.LBFGS(p),
    "torch.optim.sparse_adam.SparseAdam": lambda p: o.SparseAdam(p),
    f"{__name__}.MyAdam": MyAdam,
    f"{__name__}.Foreign": Foreign,
    f"{__name__}.LARS": ForeignLARS,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_optimizer_whose_scale_is_not_known_is_refused_with_the_ways_out(name: str) -> None:
    weights = nn.Parameter(torch.ones(3))
    optimizer = UNKNOWN[name]([weights])
    with pytest.raises(ValueError, match="scales a gradient is not known") as error:
        Extrapolation(optimizer, LocalGradient(ratio=0.5))
    for said in (f"how {name} scales", 'precondition="none"', "or a function of (optimizer"):
        assert said in str(error.value)
    Extrapolation(optimizer, LocalGradient(ratio=0.5, precondition="none"))
    Extrapolation(optimizer, LocalGradient(ratio=0.5, precondition=lambda _, __, g: g))
    Extrapolation(optimizer, SAM(radius=0.1))


def test_a_function_of_ones_own_scales_the_gradient() -> None:
    seen = []

    def scaled(
        optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        seen.append((optimizer, list(parameters)))
        return [x * g for x, g in zip(parameters, gradients, strict=True)]

    weights = [nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.full((2, 2), 3.0))]
    optimizer = Foreign(weights)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5, precondition=scaled))
    for step in range(2):
        with extrapolation.shifted():
            for p, x in zip(weights, (2.0, 3.0), strict=True):
                # x − 0.5·0.1·x·4
                shifted = x - 0.2 * x if step else x
                torch.testing.assert_close(p.detach(), torch.full_like(p, shifted))
                p.grad = torch.full_like(p, 4.0)
        optimizer.step()
    assert seen[0][0] is optimizer
    assert all(a is b for a, b in zip(seen[0][1], weights, strict=True))


@pytest.mark.parametrize("size", [0.25, None])
def test_a_function_of_ones_own_goes_with_size_rate_and_clipping(size: float | None) -> None:
    direction = LocalGradient(
        size=size,
        rate=None if size else 2.0,
        scaling="layer" if size else "none",
        precondition=lambda _, __, gradients: [3 * g for g in gradients],
    )
    weights = torch.tensor([3.0, 4.0]).double().requires_grad_()
    optimizer = Foreign([weights])
    at = point(
        base_state(optimizer),
        [weights],
        state={"gradient": [torch.tensor([0.0, 2.0]).double()]},
        clip_factor=torch.tensor(0.5).double(),
    )
    with torch.no_grad():
        (zeta,) = direction.zeta(at)
    expected = torch.tensor([0.0, 0.25 * 5 if size else 2.0 * 3 * 0.5 * 2]).double()
    torch.testing.assert_close(zeta, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------
# State that is elsewhere


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer as timm's class of this name does; its own state stays empty."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Make a step of the wrapped optimizer."""
        self.base.step()


@pytest.fixture(params=["lookahead", "zero"])
def wrapped(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
    """Yield a parameter and an optimizer of it that wraps Adam."""
    weights = nn.Parameter(torch.ones(3))
    if request.param == "lookahead":
        yield weights, Lookahead(torch.optim.Adam([weights], 0.1))
        return
    with warnings.catch_warnings():
        # The package scripts functions when it is imported, which torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'x'}", rank=0, world_size=1)
    try:
        yield weights, ZeroRedundancyOptimizer([weights], torch.optim.Adam, lr=0.1)
    finally:
        dist.destroy_process_group()


def test_momentum_that_is_kept_elsewhere_is_an_error_after_an_update(
    wrapped: tuple[nn.Parameter, torch.optim.Optimizer],
) -> None:
    weights, optimizer = wrapped
    MSAM(radius=0.1).check_base(optimizer)
    base = base_state(optimizer, updates=0)
    assert not base.momentum()[0].any()
    weights.grad = torch.ones(3)
    optimizer.step()
    base.updates = 1
    with pytest.raises(
        RuntimeError, match="keeps no momentum of a parameter that it has updated: load its state"
    ):
        base.momentum()
    base.updated = [False]
    assert not base.momentum()[0].any()


def test_a_wrapper_is_refused_where_its_scale_is_asked_for(
    wrapped: tuple[nn.Parameter, torch.optim.Optimizer],
) -> None:
    _, optimizer = wrapped
    with pytest.raises(ValueError, match='not known: give the direction precondition="none"'):
        LocalGradient(ratio=1.0).check_base(optimizer)
    LocalGradient(ratio=1.0, precondition="none").check_base(optimizer)


def without_state(name: str) -> tuple[BaseState, list[Tensor]]:
    """Return the state of an optimizer that made an update and has lost what it kept."""
    gradients = some_gradients()
    parameters = [nn.Parameter(torch.ones_like(g)) for g in gradients]
    optimizer = STEADY[name](parameters)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.state.clear()
    return base_state(optimizer), gradients


@pytest.mark.parametrize("name", [name for name in STEADY if " " not in name and name != "SGD"])
def test_a_scale_without_its_state_is_an_error_after_an_update(name: str) -> None:
    base, gradients = without_state(name)
    with pytest.raises(
        RuntimeError,
        match=r"keeps no state of a parameter that it has updated: .*give the direction precond",
    ):
        base.preconditioned(gradients)
    base.updates = 0
    base.preconditioned(gradients)


def test_a_parameter_that_never_had_a_gradient_needs_no_state() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([used, unused], 0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    base = base_state(optimizer)
    base.updated = [True, False]
    gradients = [torch.ones(3), torch.ones(2)]
    torch.testing.assert_close(base.preconditioned(gradients), [torch.ones(3), torch.zeros(2)])
    torch.testing.assert_close(base.momentum(), [torch.full((3,), 0.1), torch.zeros(2)])


# ---------------------------------------------------------------------------------------------
# Momentum


def test_along_the_momentum_only_what_the_last_update_moved_is_shifted() -> None:
    moved, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([moved, idle], 0.1, 0.9)
    for p in (moved, idle):
        p.grad = torch.ones_like(p)
    optimizer.step()
    idle.grad = None
    optimizer.step()
    base = base_state(optimizer, updates=2)
    base.updated = [True, False]
    first, second = MSAM(radius=0.5).zeta(point(base, [moved, idle]))
    torch.testing.assert_close(first, torch.full((2,), 0.5 / 2**0.5))
    assert not second.any()


def test_nesterovs_look_ahead_stays_where_torchs_own_is_without_a_gradient() -> None:
    ours, torchs = ([nn.Parameter(torch.ones(3).double())] for _ in range(2))
    heavy_ball = torch.optim.SGD(ours, 0.1, 0.9)
    nesterov = torch.optim.SGD(torchs, 0.1, 0.9, nesterov=True)
    base = base_state(heavy_ball, updates=0)
    for step in range(6):
        (zeta,) = Nesterov().zeta(point(base, [*ours]))
        torch.testing.assert_close((ours[0] - zeta).detach(), torchs[0].detach())
        gradient = None if step == 3 else (ours[0] - zeta).detach() * 2
        ours[0].grad, torchs[0].grad = gradient, gradient
        heavy_ball.step()
        nesterov.step()
        base.updates, base.updated = step + 1, [gradient is not None]


@pytest.mark.parametrize("direction", [MSAM(radius=0.1)], ids=["msam"])
def test_nadam_looks_ahead_itself_and_is_refused(direction: Direction) -> None:
    optimizer = torch.optim.NAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"replaces NAdam's look-ahead: use torch\.optim\.Adam"):
        Extrapolation(optimizer, direction)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "Adamax", "RMSprop"])
@pytest.mark.parametrize("foreach", [False, True])
def test_momentum_and_scale_are_those_of_what_is_minimised(name: str, foreach: bool) -> None:
    given = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    states = []
    for sign in (1, -1):
        parameters = [nn.Parameter(torch.ones_like(g)) for g in some_gradients()]
        optimizer = getattr(torch.optim, name)(
            parameters, lr=0.1, maximize=sign < 0, foreach=foreach, **given
        )
        for step in range(3):
            for p, g in zip(parameters, some_gradients(), strict=True):
                p.grad = sign * (g + step)
            optimizer.step()
        base = base_state(optimizer)
        states.append((base.momentum(), base.preconditioned(some_gradients())))
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=0)
    assert any(v.abs().max() > 0 for v in states[0][0])


# ---------------------------------------------------------------------------------------------
# Complex parameters: as torch's optimizers do, real and imaginary parts are separate weights


def complex_gradients() -> list[Tensor]:
    return some_gradients(torch.complex128)


def as_reals(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t).clone() for t in tensors]


@pytest.mark.parametrize("kind", [LAMB, LARS], ids=["lamb", "lars"])
def test_complex_weights_are_updated_as_pairs_of_real_ones(kind: type[LARS] | type[LAMB]) -> None:
    settings = {"weight_decay": 0.2, "adapt_norm_and_bias": True, "decay_norm_and_bias": True}
    weights = [nn.Parameter(g.flip(0) + 0.3) for g in complex_gradients()]
    pairs = [nn.Parameter(w) for w in as_reals([w.detach() for w in weights])]
    complex_one, real_one = (kind(these, lr=0.1, **settings) for these in (weights, pairs))
    for step in range(4):
        for w, pair, g in zip(weights, pairs, complex_gradients(), strict=True):
            w.grad = (g * (step + 1j)).conj() if step % 2 else g
            pair.grad = torch.view_as_real(w.grad.resolve_conj()).clone()
        complex_one.step()
        real_one.step()
    for w, pair in zip(weights, pairs, strict=True):
        parts = torch.view_as_real(w.detach())
        torch.testing.assert_close(parts, pair.detach(), rtol=1e-12, atol=0)
        ratio = complex_one.state[w]["trust_ratio"]
        assert ratio.dtype == torch.float64
        torch.testing.assert_close(ratio, real_one.state[pair]["trust_ratio"])
        for name, kept in complex_one.state[w].items():
            if name not in ("step", "trust_ratio"):
                assert kept.dtype == torch.complex128


def test_lamb_moves_real_and_imaginary_part_by_themselves() -> None:
    weight = nn.Parameter(torch.tensor(1 + 0j).to(torch.complex128))
    weight.grad = torch.tensor(3 + 4j).to(torch.complex128)
    LAMB([weight], 0.1, eps=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.tensor(0.9 - 0.1j).to(torch.complex128))


@pytest.mark.parametrize(
    "name", [name for name in STEADY if "fused" not in name and not name.startswith("Adafactor")]
)
def test_complex_gradients_are_scaled_as_pairs_of_real_ones(name: str) -> None:
    weights = 0.0 if name.startswith("ASGD") else 0.8
    last, shift, following = step_and_shift(STEADY[name], complex_gradients(), weights=weights)
    step = following if name.startswith(ITS_SCALE_IS_THAT_OF_THE_NEXT_STEP) else last
    torch.testing.assert_close(shift, step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("direction", [SAM(radius=0.3), MSAM(radius=0.3)], ids=["sam", "msam"])
def test_norms_of_complex_directions_count_both_parts(direction: Direction) -> None:
    gradients = complex_gradients()
    found = []
    for these in (gradients, as_reals(gradients)):
        parameters = [nn.Parameter(torch.ones_like(g)) for g in these]
        optimizer = torch.optim.SGD(parameters, 0.1, 0.9)
        for p, g in zip(parameters, these, strict=True):
            p.grad = g.clone()
        optimizer.step()
        found.append(
            direction.zeta(point(base_state(optimizer), [*parameters], second_gradient=list(these)))
        )
    torch.testing.assert_close(as_reals(found[0]), found[1], rtol=1e-12, atol=0)
    length = sum(float(z.abs().square().sum()) for z in found[0]) ** 0.5
    assert length == pytest.approx(0.3)


def test_complex_shifts_are_scaled_to_the_weights_by_layer_and_filter() -> None:
    zeta, weights = complex_gradients(), [g.flip(0) + 0.5j for g in complex_gradients()]
    found = scaled_to_weights(zeta, weights, 0.5, "layer")
    expected = scaled_to_weights(as_reals(zeta), as_reals(weights), 0.5, "layer")
    torch.testing.assert_close(as_reals(found), expected, rtol=1e-12, atol=0)
    for z, x in zip(scaled_to_weights(zeta, weights, 0.5, "filter"), weights, strict=True):
        rows = (z, x) if z.ndim > 1 else (z[None], x[None])
        for z_row, x_row in zip(*rows, strict=True):
            # The 1e-6 of the rule shortens a little.
            assert float(z_row.norm()) == pytest.approx(0.5 * float(x_row.norm()), rel=1e-5)


def test_a_complex_run_is_that_on_its_pairs() -> None:
    targets = complex_gradients()[:3]
    weights = [nn.Parameter(torch.ones_like(t)) for t in targets]
    pairs = [nn.Parameter(torch.view_as_real(w.detach()).clone()) for w in weights]
    runs = []
    for parameters in (weights, pairs):
        optimizer = torch.optim.Adam(parameters, 0.05)
        runs.append((optimizer, Extrapolation(optimizer, LocalGradient(ratio=0.5))))
    for _ in range(5):
        for (optimizer, extrapolation), parameters in zip(runs, (weights, pairs), strict=True):
            with extrapolation.shifted():
                optimizer.zero_grad()
                whole = [p if p.is_complex() else torch.view_as_complex(p) for p in parameters]
                loss = sum(
                    ((w - t) * (w * t + 1)).abs().square().sum()
                    for w, t in zip(whole, targets, strict=True)
                )
                torch.autograd.backward(loss)
            optimizer.step()
    for w, pair in zip(weights, pairs, strict=True):
        torch.testing.assert_close(
            torch.view_as_real(w.detach()), pair.detach(), rtol=1e-10, atol=1e-12
        )


# ---------------------------------------------------------------------------------------------
# LARS and LAMB where there is nothing to do


@pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["lars", "lamb"])
def test_a_group_without_a_gradient_is_left_alone(optimizer: type[LARS] | type[LAMB]) -> None:
    dropped, used = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    alone = copy.deepcopy(used)
    both = optimizer([{"params": [dropped]}, {"params": [used]}], lr=0.1)
    single = optimizer([alone], lr=0.1)
    for _ in range(2):
        used.grad, alone.grad = torch.ones(2, 2), torch.ones(2, 2)
        both.step()
        single.step()
    assert torch.equal(dropped, torch.ones(2, 2))
    assert dropped not in both.state
    assert torch.equal(used, alone)


@pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["lars", "lamb"])
def test_without_any_gradient_no_step_is_made(optimizer: type[LARS] | type[LAMB]) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    with pytest.raises(
        RuntimeError, match=r"^no parameter has a gradient: call backward\(\) before step\(\)$"
    ):
        optimizer(groups, lr=0.1).step()
    optimizer([nn.Parameter(torch.ones(2), requires_grad=False)], lr=0.1).step()


@pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["lars", "lamb"])
def test_at_a_rate_of_zero_the_weights_stay(optimizer: type[LARS] | type[LAMB]) -> None:
    weights = nn.Parameter(torch.ones(2, 2))
    used = optimizer([weights], lr=0.0, weight_decay=0.1)
    weights.grad = torch.full((2, 2), 3.0)
    used.step()
    assert torch.equal(weights, torch.ones(2, 2))
