"""The public data sets, one row each; reading their names imports neither NumPy nor torch."""

from collections.abc import Mapping

from egtrain.data.cifar import CIFAR10, CIFAR100
from egtrain.data.finding import DataSet, ImageSet, PairSet
from egtrain.data.multi30k import MULTI30K
from egtrain.data.wikitext2 import WIKITEXT2

IMAGES: dict[str, ImageSet] = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}
TEXTS: dict[str, DataSet] = {
    "wikitext2": WIKITEXT2,
}
"""Each layout lists the training, the validation and the test file, in this order."""
PAIRS: dict[str, PairSet] = {
    "multi30k": MULTI30K,
}
OF_TASK: dict[str, Mapping[str, DataSet]] = {
    "image": IMAGES,
    "language": TEXTS,
    "translation": PAIRS,
    "user": {},
}
"""The data sets for each task."""
