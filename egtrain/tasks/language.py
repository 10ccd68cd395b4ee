"""Language modelling: perplexity of words, by truncated back-propagation through time."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egtrain.data.text import EOS, TextData
from egtrain.errors import UsageError
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.optim.randomness import generator_for
from egtrain.tasks import Metric, Split

EVALUATION_COLUMNS = 32
EVALUATION_BATCHES = 4
"""Groups of those columns; each group is evaluated from beginning to end."""
EVALUATION_WINDOW = 100
"""Words at a time."""
FROZEN_WINDOWS = 64
NOTHING = -100
"""Target of a padded position, which does not count."""


class Window(NamedTuple):
    """A mini-batch: words [length, columns] and the words that follow them."""

    words: Tensor
    targets: Tensor
    carried: Tensor | None = None
    """A scalar bool: whether the state continues from the worker's last window or is zero. None: it
    is zero and not kept."""


def columns_of(tokens: int, workers: int, worker_batch_size: int, bptt: int) -> tuple[int, int]:
    """Return the length of each of the K·b columns of a stream, and its number of whole windows.

    Raises:
        UsageError: there is not one whole window.
    """
    columns = workers * worker_batch_size
    length = (tokens - 1) // columns
    if length < bptt:
        raise UsageError(
            f"a batch of {workers} x {worker_batch_size} = {columns} columns leaves {length} of "
            f"the {tokens} training words to each, less than a window of task.bptt = {bptt}: take "
            "fewer workers, a smaller batch or a smaller task.bptt"
        )
    return length, length // bptt


def perplexity(loss: float) -> float:
    """Return the exponential of a mean cross-entropy in nats per word."""
    return math.exp(loss) if loss < 700 else math.inf


class LanguageTask:
    """Windows of a text, loss and metric; every batch is a function of (seed, worker, step).

    The training text is cut into B = K·b columns of equal length; the rest is dropped. Worker k
    goes through columns [k·b, (k+1)·b) window by window, and carries the LSTM's state along. The
    state is in the model's buffer `hidden`, of which each worker has its own, and is zero at the
    start of an epoch. A sample is a window of `bptt` words in one column.

    Args:
        data: the text; it is moved to the device once.
        workers: K.
        worker_batch_size: b, in columns.
        seed: the run's.
        bptt: words in a window.

    Raises:
        UsageError: the columns are shorter than a window.
    """

    metric = training_metric = Metric(
        "perplexity", "", higher_is_better=False, of_mean_loss=perplexity
    )
    sums: tuple[str, ...] = ("nats", "words")

    def __init__(
        self,
        data: TextData,
        *,
        workers: int,
        worker_batch_size: int,
        seed: int,
        bptt: int,
        device: torch.device,
    ) -> None:
        length, self.steps_per_epoch = columns_of(len(data.train), workers, worker_batch_size, bptt)
        self.samples = (len(data.train) - 1) // bptt
        self.worker_batch_size = worker_batch_size
        self.batch_size = workers * worker_batch_size
        self.seed = seed
        self.bptt = bptt
        self.best_possible = data.floor
        self._train = data.train.to(device)
        used = self.batch_size * length
        self._words = self._train[:used].view(self.batch_size, length).T
        self._targets = self._train[1 : used + 1].view(self.batch_size, length).T
        self._carried = torch.tensor([False, True], device=device).unbind()
        self._held_out: dict[Split, Tensor] = {
            "validation": data.validation.to(device),
            "test": data.test.to(device),
        }

    def batch(self, worker: int, step: int) -> Window:
        """Return the worker's window for a step: words and targets [bptt, b]."""
        slot = step % self.steps_per_epoch
        rows = slice(slot * self.bptt, (slot + 1) * self.bptt)
        own = slice(worker * self.worker_batch_size, (worker + 1) * self.worker_batch_size)
        return Window(self._words[rows, own], self._targets[rows, own], self._carried[slot > 0])

    def extra_batch(self, worker: int, step: int) -> Window:
        """Return b windows from anywhere, with a state of zero, for the step's second gradient."""
        device = self._train.device
        generator = generator_for(self.seed, "extra samples", worker, step, device=device)
        starts = torch.randint(
            len(self._train) - self.bptt,
            (self.worker_batch_size,),
            generator=generator,
            device=device,
        )
        return self._windows(starts)

    def loss(self, model: nn.Module, batch: Window) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy in nats per word, and its exponential, the perplexity.

        A carried state is read from the model's buffer `hidden`, and the new one is written there.
        """
        language_model: LSTMLanguageModel = model  # type: ignore[assignment]
        state = None
        if batch.carried is not None:
            state = torch.where(batch.carried, language_model.hidden, 0.0)
        logits, state = model(batch.words, state)
        if batch.carried is not None:
            language_model.hidden.copy_(state.detach())
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
        return loss, loss.detach().exp()

    def frozen_batches(self, indices: Tensor) -> list[tuple[Window, int]]:
        """Return these windows [samples], each from a state of zero, in batches with their sizes.

        Window i starts at word i·bptt.
        """
        chosen = torch.split(indices.to(self._train.device), FROZEN_WINDOWS)
        return [(self._windows(part * self.bptt), len(part)) for part in chosen]

    def evaluation_size(self, split: Split) -> int:
        """Return the number of words of a split."""
        return len(self._held_out[split])

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of evaluation batches of a split."""
        return min(EVALUATION_BATCHES, self.evaluation_size(split))

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return [cross-entropy in nats, words] of one group of columns, float64.

        Each word of the split is predicted once, the first one from `<eos>`. Each column begins
        with a state of zero.
        """
        words, targets = (
            t.tensor_split(self.evaluation_batches(split), dim=1)[index]
            for t in self._columns(split)
        )
        state = None
        nats = torch.zeros((), dtype=torch.float64, device=words.device)
        for part, wanted in zip(
            *(torch.split(t, EVALUATION_WINDOW) for t in (words, targets)), strict=True
        ):
            logits, state = model(part, state)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1),
                wanted.flatten(),
                ignore_index=NOTHING,
                reduction="none",
            )
            nats += loss.double().sum()
        return torch.stack([nats, (targets != NOTHING).sum().double()])

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean cross-entropy in nats per word and its exponential, the perplexity."""
        nats, words = sums
        loss = nats / words
        return {"loss": loss, self.metric.name: perplexity(loss)}

    def _windows(self, starts: Tensor) -> Window:
        places = starts + torch.arange(self.bptt, device=starts.device)[:, None]
        return Window(self._train[places], self._train[places + 1])

    def _columns(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return words and targets [length, columns] of a split, column after column."""
        targets = self._held_out[split]
        columns = min(EVALUATION_COLUMNS, len(targets))
        length = -(-len(targets) // columns)
        words = F.pad(
            torch.cat([targets.new_tensor([EOS]), targets[:-1]]),
            (0, columns * length - len(targets)),
        )
        targets = F.pad(targets, (0, columns * length - len(targets)), value=NOTHING)
        return words.view(columns, length).T, targets.view(columns, length).T
