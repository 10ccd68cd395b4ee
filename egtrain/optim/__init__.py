"""Extrapolation for any `torch.optim.Optimizer`; needs nothing but torch.

>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
>>> extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.1))
>>> with extrapolation.shifted():
...     optimizer.zero_grad()
...     loss_function(model(inputs), targets).backward()
>>> optimizer.step()
"""

from egtrain.optim.along_gradient import AlongGradient
from egtrain.optim.direction import Direction, Point, State
from egtrain.optim.directions.extragradient import Extragradient
from egtrain.optim.directions.gaussian import GaussianNoise
from egtrain.optim.directions.gradient_noise import GradientNoise
from egtrain.optim.directions.local import LocalGradient
from egtrain.optim.directions.msam import MSAM
from egtrain.optim.directions.nesterov import Nesterov
from egtrain.optim.directions.optimistic import OptimisticGradient
from egtrain.optim.directions.sam import SAM
from egtrain.optim.directions.smoothout import SmoothOut
from egtrain.optim.extrapolation import Extrapolation
from egtrain.optim.lamb import LAMB
from egtrain.optim.lars import LARS
from egtrain.optim.noise import Noise
from egtrain.optim.noise_scale import NoiseScale
from egtrain.optim.scaling import scaled_to_weights

__all__ = [
    "LAMB",
    "LARS",
    "MSAM",
    "SAM",
    "AlongGradient",
    "Direction",
    "Extragradient",
    "Extrapolation",
    "GaussianNoise",
    "GradientNoise",
    "LocalGradient",
    "Nesterov",
    "Noise",
    "NoiseScale",
    "OptimisticGradient",
    "Point",
    "SmoothOut",
    "State",
    "scaled_to_weights",
]
