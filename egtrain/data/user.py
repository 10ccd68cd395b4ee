"""The data sets of a task file, and which of their samples are held out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from egtrain.data.arrays import SPLIT_SEED, fixed_order
from egtrain.errors import UsageError
from egtrain.task_file import TaskFile

SPLITS = ("train", "validation", "test")


@dataclass(eq=False)
class UserData:
    """The data sets of a task file, with what the file says of their batches."""

    file: TaskFile
    settings: Mapping[str, Any]
    datasets: Mapping[str, Any]
    """Map-style data sets by split; validation may be missing."""
    sizes: Mapping[str, int]
    """Samples of each split, asked for once, so that a run counts with one number."""
    digest: str
    """SHA-256 of what tells these data from others: tensors, or else lengths and settings."""
    metrics: tuple[str, ...] | None = None
    """The metrics that the loss returns, once it has been tried out."""
    notes: tuple[str, ...] = ()

    def size(self, split: str) -> int:
        """Return the number of samples of a split."""
        return self.sizes.get(split, 0)

    def tensors(self, split: str) -> tuple[Tensor, ...] | None:
        """Return the tensors of a split that consists of nothing else; a batch is rows of each."""
        return None if self.file.has("collate") else _plain_tensors(self.datasets[split])


def load_user_data(
    file: TaskFile, settings: Mapping[str, Any], *, train_samples: int | None, validation: int
) -> UserData:
    """Ask a task file for its data sets, and hold out `validation` training samples.

    The validation samples, then `train_samples` of the rest, are the first of one fixed
    permutation, so they are the same in every run.

    Raises:
        UsageError: a data set is none, or the split is impossible.
        TaskFileError: the task file's code raised an exception.
    """
    datasets: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for split in SPLITS:
        dataset = file.call("dataset", split, settings=settings)
        if dataset is None and split == "validation":
            continue
        datasets[split] = dataset
        sizes[split] = _size_of(file, split, dataset)
    count = sizes["train"]
    if validation and "validation" in datasets:
        raise UsageError(
            f"data.validation must be 0, because {file.name} has a validation set already: remove "
            "it"
        )
    if validation >= count:
        raise UsageError(
            f"data.validation: {validation} is not possible, as {file.name} has {count:,} training "
            f"samples and one must remain; use 0 to {count - 1}"
        )
    if train_samples is not None and train_samples > count - validation:
        raise UsageError(
            f"data.train_samples: {train_samples} is not possible, as {file.name} has {count:,} "
            f"training samples of which {validation:,} are held out; use 1 to "
            f"{count - validation}, or null for all"
        )
    if validation or train_samples is not None:
        order = fixed_order(count, SPLIT_SEED).tolist()
        used = count - validation if train_samples is None else train_samples
        train = datasets["train"]
        if validation:
            datasets["validation"] = Subset(train, order[:validation])
            sizes["validation"] = validation
        datasets["train"] = Subset(train, order[validation : validation + used])
        sizes["train"] = used
    own = {name: settings[name] for name in file.parameters["dataset"]}
    return UserData(file, settings, datasets, sizes, _digest(datasets, sizes, own))


def _size_of(file: TaskFile, split: str, dataset: Any) -> int:
    """Return the number of samples of a data set, or raise UsageError if it is no map-style one."""
    called = f"dataset({split!r})"
    if dataset is None:
        raise file.wrong(f"{called} returned None: return a data set for 'train' and for 'test'")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise file.wrong(
            f"{called} returned {type(dataset).__name__}, whose samples have no index: return a "
            "data set with __getitem__ and __len__"
        )
    if isinstance(dataset, type):
        raise file.wrong(
            f"{called} returned the class {dataset.__name__} itself: return {dataset.__name__}(...)"
        )
    if not hasattr(type(dataset), "__len__"):
        raise file.wrong(
            f"{called} returned {type(dataset).__name__}, which has no length: define __len__"
        )
    with file.running(f"len({called})"):
        length = len(dataset)
    if not length:
        raise file.wrong(f"{called} is empty: give it at least one sample")
    return length


def _plain_tensors(dataset: Any) -> tuple[Tensor, ...] | None:
    """Return the tensors of a TensorDataset, or of a part of one."""
    if type(dataset) is TensorDataset:
        return tuple(tensor.detach() for tensor in dataset.tensors)
    if type(dataset) is Subset and (whole := _plain_tensors(dataset.dataset)) is not None:
        indices = torch.as_tensor(dataset.indices, dtype=torch.int64)
        return tuple(tensor[indices] for tensor in whole)
    return None


def _digest(
    datasets: Mapping[str, Any], sizes: Mapping[str, int], settings: Mapping[str, Any]
) -> str:
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for split, dataset in datasets.items():
        digest.update(f"{split} {sizes[split]}\n".encode())
        for tensor in _plain_tensors(dataset) or ():
            digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            # As bytes, because NumPy does not know every type.
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
