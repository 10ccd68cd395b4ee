"""LARS and LAMB agree with their papers' formulas, and behave as torch's own optimizers do."""

import copy
import io
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from egtrain.optim import (
    LAMB,
    LARS,
    MSAM,
    Extragradient,
    Extrapolation,
    LocalGradient,
    Nesterov,
    OptimisticGradient,
)
from egtrain.optim.direction import Direction

Array = NDArray[np.float64]
Optimizers = type[LARS] | type[LAMB]

every_optimizer = pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["lars", "lamb"])

# ---------------------------------------------------------------------------------------------
# The papers' formulas, one parameter at a time


def lars(w: Array, g: Array, memory: dict[str, Any], group: dict[str, Any]) -> tuple[Array, float]:
    """Return the new weights and the trust ratio of LARS (arXiv 1708.03888, Algorithm 1)."""
    beta = group["weight_decay"] if w.ndim >= 2 or group["decay_norm_and_bias"] else 0.0
    w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
    trust = 1.0
    if (w.ndim >= 2 or group["adapt_norm_and_bias"]) and w_norm > 0 and g_norm > 0:
        trust = float(group["trust_coefficient"] * w_norm / (g_norm + beta * w_norm))
    memory["v"] = group["momentum"] * memory.get("v", 0.0) + group["lr"] * trust * (g + beta * w)
    return w - memory["v"], trust


def lamb(w: Array, g: Array, memory: dict[str, Any], group: dict[str, Any]) -> tuple[Array, float]:
    """Return the new weights and the trust ratio of LAMB (arXiv 1904.00962, Algorithm 2)."""
    beta1, beta2 = group["betas"]
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    v = memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    decay = group["weight_decay"] if w.ndim >= 2 or group["decay_norm_and_bias"] else 0.0
    update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + group["eps"]) + decay * w
    w_norm, update_norm = np.linalg.norm(w), np.linalg.norm(update)
    trust = 1.0
    if (w.ndim >= 2 or group["adapt_norm_and_bias"]) and w_norm > 0 and update_norm > 0:
        trust = float(w_norm / update_norm)
    return w - group["lr"] * trust * update, trust


SHAPES: list[tuple[int, ...]] = [(4, 3), (3, 2, 2, 2), (5,), (), (2, 3), (3,)]
"""Of each group: matrix, kernel, vector, scalar, zeros, a vector of zeros."""


def parameters(dtype: torch.dtype = torch.float64, seed: int = 1) -> list[nn.Parameter]:
    random = np.random.default_rng(seed)
    values = [
        torch.from_numpy(np.asarray(random.standard_normal(s))) * (n < 4)
        for n, s in enumerate(SHAPES)
    ]
    return [nn.Parameter(v.to(dtype)) for v in values]


def give_gradients(groups: list[list[nn.Parameter]], step: int) -> None:
    """Set gradients that depend on the weights and the step; now and then one is zero, or there is
    none.
    """
    random = np.random.default_rng(1000 + step)
    for group in groups:
        for n, p in enumerate(group):
            noise = torch.from_numpy(np.asarray(random.standard_normal(p.shape))).to(p.dtype)
            p.grad = p.detach() + 0.5 * noise
            if n >= 4 and step < 3:
                p.grad = torch.zeros_like(p) if step == 0 else noise
            elif (step + n) % 7 == 0:
                p.grad = None if step % 2 else torch.zeros_like(p)


def make(optimizer: Optimizers, groups: list[list[nn.Parameter]], **settings: Any) -> LARS | LAMB:
    """Return an optimizer whose groups differ in everything."""
    own: list[dict[str, Any]] = [
        {"lr": 0.3, "weight_decay": 0.05},
        {"weight_decay": 0.0},
        {"weight_decay": 0.4},
    ]
    if optimizer is LARS:
        own[1] |= {"momentum": 0.5}
        own[2] |= {"trust_coefficient": 0.4}
        settings = {"trust_coefficient": 0.1, **settings}
    else:
        own[1] |= {"betas": (0.5, 0.8)}
        own[2] |= {"eps": 0.1}
    params = [{"params": group, **more} for group, more in zip(groups, own, strict=False)]
    return optimizer(params, lr=0.1, **settings)


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
@pytest.mark.parametrize("adapt_norm_and_bias", [False, True])
@every_optimizer
def test_the_weights_follow_the_papers_formulas(
    optimizer: Optimizers, adapt_norm_and_bias: bool, decay_norm_and_bias: bool
) -> None:
    formula: Callable[..., tuple[Array, float]] = lars if optimizer is LARS else lamb
    groups = [parameters(seed=n) for n in range(3)]
    fast = make(
        optimizer,
        groups,
        adapt_norm_and_bias=adapt_norm_and_bias,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    memories: list[list[dict[str, Any]]] = [[{} for _ in group] for group in groups]
    weights = [[np.asarray(p.detach().numpy().copy()) for p in group] for group in groups]
    rates = [0.3, 0.1, 0.1]
    ratios_seen = set()
    for step in range(40):
        factor = min(1.0, (step + 1) / 5) * (0.1 if step >= 30 else 1.0)
        for settings, rate in zip(fast.param_groups, rates, strict=True):
            settings["lr"] = rate * factor
        give_gradients(groups, step)
        expected_ratios: dict[nn.Parameter, float] = {}
        for n, group in enumerate(groups):
            for i, p in enumerate(group):
                if p.grad is not None:
                    g = np.asarray(p.grad.numpy())
                    weights[n][i], expected_ratios[p] = formula(
                        weights[n][i], g, memories[n][i], fast.param_groups[n]
                    )
        fast.step()
        for n, group in enumerate(groups):
            for i, p in enumerate(group):
                np.testing.assert_allclose(
                    p.detach().numpy(), weights[n][i], rtol=1e-12, atol=1e-12
                )
        for p, ratio in expected_ratios.items():
            assert fast.state[p]["trust_ratio"].shape == ()
            assert float(fast.state[p]["trust_ratio"]) == pytest.approx(ratio, rel=1e-12)
            ratios_seen.add(round(ratio, 9))
    assert 1.0 in ratios_seen
    assert len(ratios_seen) > 100


@pytest.mark.parametrize("adapts", [False, True])
@every_optimizer
def test_norms_and_biases_adapt_only_when_asked(optimizer: Optimizers, adapts: bool) -> None:
    params = parameters()[:4]
    used = optimizer(params, lr=0.1, adapt_norm_and_bias=adapts)
    for p in params:
        p.grad = torch.full_like(p, 0.3)
    used.step()
    ratios = [float(used.state[p]["trust_ratio"]) for p in params]
    assert all(ratio != 1 for ratio in ratios[:2])
    assert all((ratio != 1) == adapts for ratio in ratios[2:])


@pytest.mark.parametrize("decays", [False, True])
@every_optimizer
def test_norms_and_biases_decay_only_when_asked(optimizer: Optimizers, decays: bool) -> None:
    params = parameters()[:4]
    before = [p.detach().clone() for p in params]
    used = optimizer(params, lr=0.1, weight_decay=0.5, decay_norm_and_bias=decays)
    for p in params:
        p.grad = torch.zeros_like(p)
    used.step()
    shrunk = [bool((p.abs() < b.abs()).all()) for p, b in zip(params, before, strict=True)]
    assert shrunk[:2] == [True, True]
    assert shrunk[2:] == [decays, decays]


@every_optimizer
def test_without_weights_or_gradients_the_ratio_is_one(optimizer: Optimizers) -> None:
    zero, still = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(2, 3))
    used = optimizer([zero, still], lr=0.5)
    zero.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    used.step()
    assert [float(used.state[p]["trust_ratio"]) for p in (zero, still)] == [1.0, 1.0]
    torch.testing.assert_close(zero.detach(), torch.full((2, 3), -0.5))
    assert torch.equal(still, torch.ones(2, 3))


# ---------------------------------------------------------------------------------------------
# As torch's optimizers behave


@every_optimizer
def test_what_has_no_gradient_stays_and_has_no_state(optimizer: Optimizers) -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    base = optimizer(
        [{"params": [used, unused, frozen]}, {"params": [nn.Parameter(torch.ones(1), False)]}],
        lr=0.1,
    )
    for _ in range(2):
        used.grad = torch.ones(2, 2)
        base.step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert torch.equal(frozen, torch.ones(3))
    assert set(base.state) == {used}


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_and_state_keep_their_type(optimizer: Optimizers, dtype: torch.dtype) -> None:
    groups = [parameters(dtype)]
    used = make(optimizer, groups)
    for step in range(5):
        give_gradients(groups, step)
        used.step()
    for p in groups[0]:
        assert p.dtype == dtype
        assert torch.isfinite(p).all()
        assert {t.dtype for name, t in used.state[p].items() if name != "step"} == {dtype}


@every_optimizer
def test_parameters_of_several_types_share_a_group(optimizer: Optimizers) -> None:
    mixed = [*parameters(torch.float32), *parameters(torch.float64)]
    alone = parameters(torch.float64)
    used, other = optimizer(mixed, lr=0.1), optimizer(alone, lr=0.1)
    for step in range(4):
        give_gradients([mixed[:6]], step)
        give_gradients([mixed[6:]], step)
        give_gradients([alone], step)
        used.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(mixed[6:], alone, strict=True))
    for a, b in zip(mixed[:6], alone, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=1e-4, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_saved_state_resumes_bit_for_bit(optimizer: Optimizers, dtype: torch.dtype) -> None:
    undisturbed = [parameters(dtype, seed) for seed in range(2)]
    used = make(optimizer, undisturbed)
    for step in range(4):
        give_gradients(undisturbed, step)
        used.step()
    file = io.BytesIO()
    torch.save((used.state_dict(), [[p.detach() for p in group] for group in undisturbed]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = [[nn.Parameter(w) for w in group] for group in weights]
    again = make(optimizer, resumed)
    again.load_state_dict(state)
    copied = copy.deepcopy(again)
    assert copied.state_dict()["param_groups"] == again.state_dict()["param_groups"]
    for step in range(4, 8):
        for groups, stepped in ((undisturbed, used), (resumed, again)):
            give_gradients(groups, step)
            stepped.step()
    for a, b in zip(chain(*undisturbed), chain(*resumed), strict=True):
        assert torch.equal(a, b)
        assert used.state[a].keys() == again.state[b].keys()
        assert all(torch.equal(used.state[a][name], again.state[b][name]) for name in used.state[a])


@every_optimizer
def test_a_closure_takes_the_gradients(optimizer: Optimizers) -> None:
    weights = nn.Parameter(torch.full((2, 2), 2.0))
    used = optimizer([weights], lr=0.1)

    def closure() -> float:
        used.zero_grad()
        loss = weights.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    losses = [used.step(closure) for _ in range(3)]
    assert losses[0] == 16.0
    assert losses[2] < losses[1] < losses[0]


@every_optimizer
def test_torchs_schedulers_set_the_rate(optimizer: Optimizers) -> None:
    weights = nn.Parameter(torch.ones(2, 2))
    used = optimizer([weights], lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(used, step_size=1, gamma=0.5)
    weights.grad = torch.ones(2, 2)
    used.step()
    scheduler.step()
    assert used.param_groups[0]["lr"] == 0.2


# ---------------------------------------------------------------------------------------------
# What a user can do wrong

WRONG: list[tuple[Optimizers, dict[str, Any], str]] = [
    *(
        (kind, {"lr": lr}, "lr must be at least 0")
        for kind in (LARS, LAMB)
        for lr in (-0.1, math.nan)
    ),
    *((kind, {"weight_decay": -1e-4}, "weight_decay must be at least 0") for kind in (LARS, LAMB)),
    *(
        (LARS, {"momentum": m}, "momentum must be at least 0 and below 1")
        for m in (-0.1, 1.0, math.nan)
    ),
    *((LARS, {"trust_coefficient": t}, "trust_coefficient must be above 0") for t in (0.0, -0.001)),
    *(
        (LAMB, {"betas": b}, "betas must be at least 0 and below 1")
        for b in ((1.0, 0.9), (0.9, -0.1), (0.9, 1.0))
    ),
    (LAMB, {"eps": -1e-6}, "eps must be at least 0"),
]


@pytest.mark.parametrize(("optimizer", "settings", "message"), WRONG)
@pytest.mark.parametrize("of_a_group", [False, True])
def test_settings_out_of_range_are_refused(
    optimizer: Optimizers, settings: dict[str, Any], message: str, of_a_group: bool
) -> None:
    weights, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [other]}, {"params": [weights], **(settings if of_a_group else {})}]
    with pytest.raises(ValueError, match=f"^{message}, not ") as error:
        optimizer(groups, **{"lr": 0.1, **({} if of_a_group else settings)})
    assert str(next(iter(settings.values()))) in str(error.value)


@every_optimizer
def test_sparse_gradients_are_refused(optimizer: Optimizers) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    used = optimizer(embedding.parameters(), lr=0.1)
    torch.autograd.backward(embedding(torch.tensor([1, 2])).sum())
    with pytest.raises(RuntimeError, match="dense gradients: use sparse=False"):
        used.step()


# ---------------------------------------------------------------------------------------------
# As the base of an extrapolation


def base(name: str, params: Any) -> torch.optim.Optimizer:
    """Return a base optimizer by name."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9),
        "lars": lambda p: LARS(p, 0.1, weight_decay=0.1),
        "lamb": lambda p: LAMB(p, 0.1, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1),
        "amsgrad": lambda p: torch.optim.Adam(p, 0.1, (0.5, 0.6), amsgrad=True),
        "nadam": lambda p: torch.optim.NAdam(p, 0.1),
        "fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    }
    return makers[name](params)


def factor_of(state: dict[str, Any], group: dict[str, Any]) -> Any:
    """Return by what a gradient is multiplied, from the words of METHOD."""
    factor = torch.as_tensor(state.get("trust_ratio", 1.0), dtype=torch.float64)
    if "exp_avg_sq" in state:
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        factor = factor / (
            (v / (1 - group["betas"][1] ** int(state["step"]))).sqrt() + group["eps"]
        )
    return factor


BASES = [
    "sgd",
    "lars",
    "lamb",
    "adam",
    "adamw",
    "amsgrad",
    "nadam",
    "fused",
]


@pytest.mark.parametrize("name", BASES)
def test_the_shift_has_the_scale_of_the_bases_own_step(name: str) -> None:
    groups = [parameters(seed=n)[:4] for n in range(2)]
    late = groups[1][0]
    used = base(name, [{"params": groups[0]}, {"params": groups[1], "lr": 0.05}])
    extrapolation = Extrapolation(used, LocalGradient(ratio=0.5))
    for step in range(4):
        before = [p.detach().clone() for group in groups for p in group]
        past = [None if p.grad is None else p.grad.clone() for group in groups for p in group]
        with extrapolation.shifted():
            after = [p.detach().clone() for group in groups for p in group]
            for number, group in enumerate(groups):
                for p in group:
                    p.grad = p.detach() * (step + 1) - 0.3 * (number + 1)
            if step == 0:
                late.grad = None
        numbers = [0] * 4 + [1] * 4
        for p, number, x, y, g in zip(chain(*groups), numbers, before, after, past, strict=True):
            settings = used.param_groups[number]
            zeta = (
                0 * x
                if g is None
                else 0.5 * settings["lr"] * factor_of(used.state.get(p, {}), settings) * g
            )
            torch.testing.assert_close(x - y, zeta, rtol=1e-9, atol=1e-14)
        used.step()


@pytest.mark.parametrize("direction", [LocalGradient(ratio=0.5), OptimisticGradient(ratio=0.5)])
def test_a_closure_may_hold_the_block(direction: Direction) -> None:
    weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
    used = torch.optim.SGD([weights], lr=0.1)

    def closure() -> float:
        with extrapolation.shifted():
            weights.grad = weights.detach().clone()
        return 0.0

    extrapolation = Extrapolation(used, direction)
    used.step(closure)
    used.step(closure=closure)
    assert extrapolation.steps == 2
    expected = 0.9 - 0.1 * (0.9 - 0.05)
    torch.testing.assert_close(weights.detach(), torch.full((3,), expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["adam", "amsgrad", "lamb", "nadam"])
def test_before_there_is_a_second_moment_there_is_no_shift(name: str) -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    used = base(name, [weights])
    extrapolation = Extrapolation(used, Extragradient(rate=1.0))

    def backward() -> None:
        weights.grad = torch.full_like(weights, 0.5)

    for step in range(2):
        before = weights.detach().clone()
        with extrapolation.shifted(gradient=backward):
            assert torch.equal(weights, before) == (step == 0)
            backward()
        if step == 0:
            assert not used.state
        used.step()


def test_before_the_first_update_the_trust_ratio_is_one() -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    extrapolation = Extrapolation(LARS([weights], lr=0.5), Extragradient(ratio=0.5))

    def backward() -> None:
        weights.grad = torch.ones_like(weights)

    with extrapolation.shifted(gradient=backward):
        torch.testing.assert_close(weights.detach(), torch.full((3, 2), 0.75))
        backward()


@pytest.mark.parametrize("name", ["lars", "lamb", "adam"])
def test_without_preconditioning_the_shift_is_the_gradient(name: str) -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    used = base(name, [weights])
    extrapolation = Extrapolation(used, LocalGradient(rate=0.25, precondition="none"))
    for _ in range(2):
        before = weights.detach().clone()
        past = torch.zeros_like(before) if weights.grad is None else weights.grad.clone()
        with extrapolation.shifted():
            torch.testing.assert_close(weights.detach(), before - 0.25 * past)
            weights.grad = torch.full_like(weights, 0.5)
        used.step()


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb", "adam", "adamw"])
def test_the_shift_along_the_momentum_has_the_length_of_the_radius(name: str) -> None:
    params = parameters()[:4]
    unused = nn.Parameter(torch.ones(2))
    used = base(name, [*params, unused])
    extrapolation = Extrapolation(used, MSAM(radius=0.3), 2)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for worker in range(2):
            with extrapolation.shifted(worker):
                shift = [x - p.detach() for x, p in zip(before, params, strict=True)]
                for p in params:
                    p.grad = p.detach() - 0.5 * worker
            assert float(nn.utils.get_total_norm(shift)) == pytest.approx(0.3 if step else 0.0)
            if step:
                name_of_it = (
                    "momentum_buffer" if "momentum_buffer" in used.state[params[0]] else "exp_avg"
                )
                momentum = [used.state[p][name_of_it] for p in params]
                along = sum(float((z * v).sum()) for z, v in zip(shift, momentum, strict=True))
                assert along == pytest.approx(0.3 * float(nn.utils.get_total_norm(momentum)))
        used.step()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "set it above 0 in group 0"),
        (lambda p: LARS(p, 0.1, momentum=0.0), "set it above 0 in group 0"),
        (lambda p: torch.optim.RMSprop(p, 0.1), "set it above 0 in group 0"),
        (lambda p: torch.optim.Adam(p, 0.1, (0.0, 0.9)), "set it above 0 in group 0"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), r"set nesterov=False in group 0"),
        (
            lambda p: torch.optim.SGD(
                [{"params": p}, {"params": [nn.Parameter(torch.ones(1))], "momentum": 0}], 0.1, 0.9
            ),
            "set it above 0 in group 1",
        ),
    ],
    ids=["sgd", "lars", "rmsprop", "adam", "nesterov", "second group"],
)
def test_a_base_without_heavy_ball_momentum_is_refused(
    optimizer: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Extrapolation(optimizer([nn.Parameter(torch.ones(2))]), MSAM(radius=0.1))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "set it above 0 in group 0"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), r"set nesterov=False in group 0"),
        (lambda p: LARS(p, 0.1), "as the base optimizer, not LARS"),
        (lambda p: torch.optim.Adam(p, 0.1), "as the base optimizer, not Adam"),
    ],
    ids=["no momentum", "nesterov", "lars", "adam"],
)
def test_nesterovs_look_ahead_refuses_a_base_other_than_sgd_with_heavy_ball_momentum(
    optimizer: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Extrapolation(optimizer([nn.Parameter(torch.ones(2))]), Nesterov())


@pytest.mark.parametrize("name", ["lars", "lamb", "adam", "adamw"])
@pytest.mark.parametrize(
    "direction", [LocalGradient(ratio=0.5), MSAM(radius=0.1)], ids=["local", "msam"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extrapolation_over_it_resumes_bit_for_bit(
    name: str, direction: Direction, dtype: torch.dtype
) -> None:
    def start(
        weights: list[Tensor],
    ) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Extrapolation]:
        params = [nn.Parameter(w.clone()) for w in weights]
        used = base(name, params)
        return params, used, Extrapolation(used, direction)

    def train(
        params: list[nn.Parameter],
        used: torch.optim.Optimizer,
        extrapolation: Extrapolation,
        step: int,
    ) -> None:
        with extrapolation.shifted():
            give_gradients([params], step)
        used.step()

    undisturbed = start([p.detach() for p in parameters(dtype)])
    for step in range(4):
        train(*undisturbed, step)
    file = io.BytesIO()
    torch.save(
        [[p.detach() for p in undisturbed[0]], *(part.state_dict() for part in undisturbed[1:])],
        file,
    )
    file.seek(0)
    weights, *states = torch.load(file, weights_only=True)
    resumed = start(weights)
    for part, state in zip(resumed[1:], states, strict=True):
        part.load_state_dict(state)
    for step in range(4, 7):
        train(*undisturbed, step)
        train(*resumed, step)
        assert all(torch.equal(a, b) for a, b in zip(undisturbed[0], resumed[0], strict=True))
        assert all(a.dtype == dtype and torch.isfinite(a).all() for a in resumed[0])
