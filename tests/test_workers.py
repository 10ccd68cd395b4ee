"""Workers clip their mean gradient as PyTorch does, and make no update after one that was not
finite.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from egtrain.workers import Ranks, Workers


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()


@pytest.mark.parametrize("maximum", [0.01, 0.5, 0.99, 1.0, 1.01, 50.0])
def test_clipping_is_that_of_pytorch(maximum: float) -> None:
    net = model()
    workers = Workers(net, 1, Ranks())
    gradient = torch.randn(workers.gradients.shape, dtype=torch.float64)
    workers.gradients.copy_(gradient / gradient.norm())
    reference = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    for p, own in zip(reference, net.parameters(), strict=True):
        assert own.grad is not None
        p.grad = own.grad.clone()
    nn.utils.clip_grad_norm_(reference, maximum)
    workers.clip(maximum)
    for p, own in zip(reference, net.parameters(), strict=True):
        assert own.grad is not None
        assert p.grad is not None
        torch.testing.assert_close(own.grad, p.grad, rtol=1e-12, atol=0)


def test_what_all_workers_would_share_is_left_out_of_the_training() -> None:
    net = nn.BatchNorm1d(3)
    Workers(net, 2, Ranks())
    net(torch.randn(4, 3))
    assert net.num_batches_tracked is None


def local_step(workers: Workers, gradients: list[float], loss: float = 1.0) -> Tensor:
    """Let each worker subtract such a gradient from its weights; return all weights afterwards."""
    workers.begin_step()
    for worker, value in enumerate(gradients):
        workers.enter_local_weights(worker)
        workers.enter(worker)
        workers.gradients.fill_(value)
        workers.report(worker, torch.tensor(loss), torch.tensor(0.0), None)
        workers.parameters.sub_(workers.gradients)
        workers.keep_local_weights(worker)
    workers.report_only(False)
    own = workers.state_dict()["parameters"]
    assert own is not None
    return own


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_after_a_bad_gradient_no_worker_goes_on_by_itself(bad: float) -> None:
    workers = Workers(model(), 3, Ranks())
    workers.begin_local_phase()
    first = local_step(workers, [1.0, 1.0, 1.0])
    second = local_step(workers, [1.0, bad, 1.0])
    assert torch.equal(second[1], first[1])
    assert torch.equal(second[0], first[0] - 1)
    # The host has not heard of it yet.
    assert torch.equal(local_step(workers, [1.0, 1.0, 1.0]), second)
