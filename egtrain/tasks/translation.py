"""Translation: cross-entropy over subwords, and BLEU of a model's translations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from egtrain.data.pairs import PairData, Sentences
from egtrain.data.subwords import BOS, EOS, PAD
from egtrain.formatting import FRACTION
from egtrain.models.decoding import Decodable, beam_search
from egtrain.optim.randomness import generator_for
from egtrain.tasks import Metric, Split
from egtrain.tasks.order import steps_in_epoch

EVALUATION_BATCH = 100
FROZEN_BATCH = 32
POOL = 100
"""A worker's mini-batches in a pool of sentences, which are sorted by length."""
BLEU_SUMS = (
    *("hypothesis length", "reference length"),
    *(f"{what} {n}-grams" for what in ("right", "all") for n in (1, 2, 3, 4)),
)


class Pairs(NamedTuple):
    """A mini-batch with `PAD`: source [b, source length], target and what follows [b, length].

    The target starts with `BOS`, and `following` has each position's next subword.
    """

    source: Tensor
    target: Tensor
    following: Tensor


class TranslationTask:
    """Pairs of sentences, loss and metric; every batch is a function of (seed, worker, step).

    An epoch is a new permutation of the training pairs, split into ⌊N/(K·b)⌋ batches; worker k
    takes slots [k·b, (k+1)·b) of each, and the rest is dropped. A worker sorts pools of its
    sentences by length, splits them into mini-batches of similar lengths, and goes through these in
    a random order, which is a function of (seed, epoch, worker).

    Args:
        data: the sentences; they are moved to the device once.
        workers: K.
        worker_batch_size: b, in pairs.
        seed: the run's.
        label_smoothing: the probability that the training loss spreads over all subwords.

    Raises:
        UsageError: a batch is larger than the training data.
    """

    metric = Metric("bleu", "BLEU", higher_is_better=True)
    training_metric = Metric("token_accuracy", FRACTION, higher_is_better=True)
    best_possible: float | None = None
    sums: tuple[str, ...] = ("nats", "subwords", *BLEU_SUMS)

    def __init__(
        self,
        data: PairData,
        *,
        workers: int,
        worker_batch_size: int,
        seed: int,
        label_smoothing: float,
        device: torch.device,
    ) -> None:
        self.samples = len(data.train)
        self.steps_per_epoch = steps_in_epoch(self.samples, workers, worker_batch_size)
        self.workers = workers
        self.worker_batch_size = worker_batch_size
        self.batch_size = workers * worker_batch_size
        self.seed = seed
        self.label_smoothing = label_smoothing
        self.device = device
        self._data = data
        self._source = _padded(data.train.source, device).int()
        self._target = _padded(data.train.target, device).int()
        # On the host, which needs them for the shape of a batch.
        self._lengths = torch.tensor(
            [
                [len(source), len(target)]
                for source, target in zip(data.train.source, data.train.target, strict=True)
            ]
        )
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._permutation: tuple[int, Tensor] | None = None

    def batch(self, worker: int, step: int) -> Pairs:
        """Return the worker's mini-batch for a step."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        if self._orders.get(worker, (None,))[0] != epoch:
            self._orders[worker] = (epoch, self._order(epoch, worker))
        return self._pairs(self._orders[worker][1][slot])

    def extra_batch(self, worker: int, step: int) -> Pairs:
        """Return b independently drawn pairs for the step's second gradient."""
        generator = generator_for(self.seed, "extra samples", worker, step)
        return self._pairs(
            torch.randint(self.samples, (self.worker_batch_size,), generator=generator)
        )

    def loss(self, model: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        """Return the mean smoothed cross-entropy in nats, and the fraction of right subwords."""
        logits = model(batch.source, batch.target).float().flatten(0, 1)
        following = batch.following.flatten()
        loss = F.cross_entropy(
            logits, following, ignore_index=PAD, label_smoothing=self.label_smoothing
        )
        counted = following != PAD
        return loss, ((logits.detach().argmax(1) == following) & counted).sum() / counted.sum()

    def frozen_batches(self, indices: Tensor) -> list[tuple[Pairs, int]]:
        """Return these training pairs [pairs] in batches, each with its number of target subwords.

        That is the weight of a batch, since the loss is a mean over subwords.
        """
        return [
            (self._pairs(part), int(self._lengths[part, 1].sum()))
            for part in torch.split(indices.cpu(), FROZEN_BATCH)
        ]

    def sentences(self, split: Split) -> Sentences:
        """Return the sentences of a split."""
        return self._data.validation if split == "validation" else self._data.test

    def evaluation_size(self, split: Split) -> int:
        """Return the number of pairs of a split."""
        return len(self.sentences(split))

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of evaluation batches of a split."""
        return -(-self.evaluation_size(split) // EVALUATION_BATCH)

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return `sums` over one evaluation batch, float64; it is translated greedily."""
        chosen = self._by_length(split)[index]
        sentences = self.sentences(split)
        pairs = _with_beginning(
            _padded([sentences.source[i] for i in chosen], self.device),
            _padded([sentences.target[i] for i in chosen], self.device),
        )
        logits = model(pairs.source, pairs.target).float().flatten(0, 1)
        following = pairs.following.flatten()
        nats = F.cross_entropy(logits, following, ignore_index=PAD, reduction="none").double().sum()
        hypotheses = self._translated(model, pairs.source, beam=1, length_penalty=1.0)
        score = _bleu().corpus_score(hypotheses, [[sentences.target_text[i] for i in chosen]])
        counts = [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return torch.tensor(
            [float(nats), int((following != PAD).sum()), *counts], dtype=torch.float64
        )

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean cross-entropy in nats, not smoothed, and BLEU, 0 to 100."""
        from sacrebleu.metrics.bleu import BLEU

        nats, subwords, *counts = sums
        system, reference, *ngrams = (round(count) for count in counts)
        score = BLEU.compute_bleu(ngrams[:4], ngrams[4:], system, reference, smooth_method="exp")
        return {"loss": nats / subwords, self.metric.name: score.score}

    def translate(
        self,
        model: nn.Module,
        split: Split,
        *,
        beam: int,
        length_penalty: float,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[str]:
        """Return a split's translations; `progress` is called with (done, total) sentences."""
        translations = [""] * self.evaluation_size(split)
        training = model.training
        model.eval()
        done = 0
        with torch.inference_mode():
            for chosen in self._by_length(split):
                source = _padded([self.sentences(split).source[i] for i in chosen], self.device)
                translated = self._translated(
                    model, source, beam=beam, length_penalty=length_penalty
                )
                for place, text in zip(chosen, translated, strict=True):
                    translations[place] = text
                done += len(chosen)
                progress(done, len(translations))
        model.train(training)
        return translations

    def score(self, hypotheses: Sequence[str], split: Split) -> tuple[float, str]:
        """Return BLEU, 0 to 100, and sacreBLEU's signature (Post 2018, arXiv 1804.08771)."""
        bleu = _bleu()
        score = bleu.corpus_score(list(hypotheses), [list(self.sentences(split).target_text)])
        return score.score, str(bleu.get_signature())

    def _translated(
        self, model: nn.Module, source: Tensor, beam: int, length_penalty: float
    ) -> list[str]:
        decodable: Decodable = model  # type: ignore[assignment]
        # A translation may be about twice as long as its source.
        limits = 2 * (source != PAD).sum(dim=1) + 10
        found = beam_search(
            decodable,
            source,
            beam=beam,
            limits=limits,
            length_penalty=length_penalty,
            begin=BOS,
            end=EOS,
        )
        return [self._data.subwords.decode(ids) for ids in found]

    def _by_length(self, split: Split) -> list[list[int]]:
        lengths = torch.tensor([len(sentence) for sentence in self.sentences(split).source])
        return [
            part.tolist()
            for part in torch.split(torch.argsort(lengths, stable=True), EVALUATION_BATCH)
        ]

    def _order(self, epoch: int, worker: int) -> Tensor:
        """Return the pairs of a worker's mini-batches in an epoch [steps, b]."""
        if self._permutation is None or self._permutation[0] != epoch:
            order = torch.randperm(self.samples, generator=generator_for(self.seed, "order", epoch))
            self._permutation = (epoch, order)
        used = self.steps_per_epoch * self.batch_size
        own = self._permutation[1][:used].view(
            self.steps_per_epoch, self.workers, self.worker_batch_size
        )[:, worker]
        batches = []
        for pool in torch.split(own.flatten(), POOL * self.worker_batch_size):
            lengths = self._lengths[pool]
            # By the target's length, then by the source's.
            key = lengths[:, 1] * (int(self._lengths.max()) + 1) + lengths[:, 0]
            batches.append(pool[torch.argsort(key, stable=True)].view(-1, self.worker_batch_size))
        generator = generator_for(self.seed, "order of mini-batches", worker, epoch)
        return torch.cat(batches)[torch.randperm(self.steps_per_epoch, generator=generator)]

    def _pairs(self, chosen: Tensor) -> Pairs:
        source, target = self._lengths[chosen].max(dim=0).values.tolist()
        # From pinned memory, so that the host does not wait for the device.
        rows = (chosen.pin_memory() if self.device.type == "cuda" else chosen).to(
            self.device, non_blocking=True
        )
        return _with_beginning(
            self._source[rows, :source].long(), self._target[rows, :target].long()
        )


def _padded(sentences: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return sentences as one tensor [sentences, longest], padded with `PAD`."""
    return pad_sequence(list(sentences), batch_first=True, padding_value=PAD).to(device)


def _with_beginning(source: Tensor, target: Tensor) -> Pairs:
    beginning = target.new_full((len(target), 1), BOS)
    return Pairs(source, torch.cat([beginning, target[:, :-1]], dim=1), target)


def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()
