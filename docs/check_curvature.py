"""Hold the curvature that `plot-sharpness` measures of a run against other ways to it; for
docs/results.md.

python docs/check_curvature.py RUN --data-dir DIR
"""

import argparse
import time

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import egtrain
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.sample import frozen_sample
from egtrain.sharpness.spectrum import eigenvalues, trace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps")
    parser.add_argument("--probes", type=int, default=30, help="random vectors of each trace")
    arguments = parser.parse_args()

    run = egtrain.load_run(arguments.run, data_dir=arguments.data_dir)
    sample = frozen_sample(run.task, arguments.samples, arguments.run)
    with FrozenLoss(run.model, run.task.loss, sample.batches) as loss:
        start = time.perf_counter()
        ours = eigenvalues(loss, count=1, steps=arguments.steps, seed=0)
        each = (time.perf_counter() - start) / loss.products
        print(
            f"{loss.size:,} weights, {arguments.samples} samples, {each:.2f} s a product",
            flush=True,
        )
        print(
            f"Lanczos, {arguments.steps} products: {ours.values[0]:.6g}, converged: "
            f"{ours.converged[0]}",
            flush=True,
        )

        before = loss.products
        hessian = LinearOperator(
            (loss.size, loss.size),
            matvec=lambda v: loss.flat_product(torch.from_numpy(np.array(v).ravel())).numpy(),
            dtype=np.float64,
        )
        # Its own random start, and a tolerance well below what is claimed.
        first = np.random.default_rng(1).standard_normal(loss.size)
        theirs = eigsh(
            hessian, k=1, which="LA", tol=1e-5, ncv=12, v0=first, return_eigenvectors=False
        )[0]
        difference = abs(ours.values[0] / theirs - 1)
        print(
            f"eigsh, {loss.products - before} products: {theirs:.6g}, relative difference "
            f"{difference:.1e}",
            flush=True,
        )

        a, b = (trace(loss, samples=arguments.probes, seed=seed) for seed in (0, 1))
        apart = abs(a.mean - b.mean) / (a.standard_error**2 + b.standard_error**2) ** 0.5
        print(
            f"trace: {a.mean:.5g} ± {a.standard_error:.2g} and {b.mean:.5g} ± "
            f"{b.standard_error:.2g}, "
            f"{apart:.2f} combined standard errors apart"
        )


if __name__ == "__main__":
    main()
