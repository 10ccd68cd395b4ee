"""The gradient noise scale, from the workers' gradients (arXiv 1812.06162, appendix A)."""

from dataclasses import asdict, dataclass


@dataclass
class NoiseScale:
    """Running estimate of the batch size, in samples, beyond which larger batches stop paying.

    The unbiased one-step estimates of |G|² and of the noise's trace S are averaged separately and
    divided last, since the mean of their ratio is badly biased. Under extrapolation the gradients
    come from different points, so the value is only approximate.
    """

    decay: float = 0.99
    squared_gradient: float = 0.0
    noise_trace: float = 0.0

    def update(
        self, mean_squared_norm: float, squared_norm_of_mean: float, workers: int, samples: int
    ) -> None:
        """Add a step: mean_k‖g^k‖² and ‖ḡ‖² (before clipping), K, and the samples b per worker."""
        if workers < 2:
            return
        squared_gradient = (workers * squared_norm_of_mean - mean_squared_norm) / (workers - 1)
        noise_trace = samples * workers / (workers - 1) * (mean_squared_norm - squared_norm_of_mean)
        self.squared_gradient += (1 - self.decay) * (squared_gradient - self.squared_gradient)
        self.noise_trace += (1 - self.decay) * (noise_trace - self.noise_trace)

    @property
    def value(self) -> float | None:
        """The noise scale in samples; None if there is no estimate (K = 1, or no gradient left)."""
        return self.noise_trace / self.squared_gradient if self.squared_gradient > 0 else None

    def state_dict(self) -> dict[str, float]:
        """Return the averages."""
        return asdict(self)
