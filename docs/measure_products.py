"""Products of the Hessian with vectors in a second, beside a plain loop of two backward passes.

python docs/measure_products.py [--device cuda] [--model resnet20] [--rounds 10]

The plain loop keeps one float32 sum per weight, and neither checks nor counts anything. Rounds
alternate, so that a slow moment of the machine falls on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from egtrain.models.resnet import ResNet
from egtrain.models.vgg import VGG
from egtrain.sharpness import FrozenLoss

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": lambda: (
        nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
        ),
        (64,),
    ),
    "resnet20": lambda: (ResNet(20, 16, 10), (3, 32, 32)),
    "vgg11": lambda: (VGG(11, 64, 10), (3, 32, 32)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--products", type=int, default=3, help="in a round")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, shape = MODELS[arguments.model]()
    model = model.to(arguments.device).eval()
    size = arguments.batch_size
    batches = [
        (
            torch.randn(size, *shape, device=arguments.device),
            torch.randint(10, (size,), device=arguments.device),
        )
        for _ in range(arguments.batches)
    ]
    criterion = nn.CrossEntropyLoss()
    weights = list(model.parameters())
    direction = [torch.randn_like(w) for w in weights]

    def plain() -> list[Tensor]:
        total = [torch.zeros_like(w) for w in weights]
        for inputs, labels in batches:
            loss = criterion(model(inputs), labels)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            products = torch.autograd.grad(gradients, weights, direction)
            for t, p in zip(total, products, strict=True):
                t.add_(p, alpha=1 / len(batches))
        return total

    with FrozenLoss.of(model, criterion, batches) as frozen:
        ours = frozen.hessian_product
        for mine, theirs in zip(ours(direction), plain(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        ratios, speeds = [], []
        for number in range(arguments.rounds):
            # Who comes first takes turns, too.
            order = [(0, lambda: ours(direction)), (1, plain)][:: 1 if number % 2 else -1]
            seconds = [0.0, 0.0]
            for which, product in order:
                seconds[which] = timed(product, arguments.products, arguments.device)
            ratios.append(seconds[1] / seconds[0])
            speeds.append(arguments.products / seconds[0])
    deviation = statistics.stdev(ratios) if len(ratios) > 1 else float("nan")
    print(
        f"{arguments.model} on {arguments.device}, {arguments.batches} batches of {size}: "
        f"{statistics.mean(speeds):.3g} products a second, {statistics.mean(ratios):.3f} ± "
        f"{deviation:.3f} of the plain loop's over {arguments.rounds} rounds"
    )


def timed(product: Callable[[], object], times: int, device: str) -> float:
    """Return the seconds that some products take."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        product()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
