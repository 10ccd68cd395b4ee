"""Mini-batches of similar sentences as a function of (seed, epoch, worker); filling never counts;
BLEU adds up.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor, nn

from egtrain.data.pairs import PairData, Sentences
from egtrain.data.subwords import BOS, EOS, PAD, Subwords
from egtrain.errors import UsageError
from egtrain.evaluate import evaluate
from egtrain.models.transformer import Transformer
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.tasks.translation import Pairs, TranslationTask
from egtrain.workers import Ranks

WORDS, WORKERS, SHARE = 20, 2, 4
CPU = torch.device("cpu")


class Letters(Subwords):
    """Every subword is a letter."""

    def __init__(self) -> None:
        self.size = WORDS

    def decode(self, ids: Any) -> str:
        return " ".join(chr(ord("a") + i) for i in ids if i > EOS)


def sentences(count: int, seed: int) -> Sentences:
    generator = torch.Generator().manual_seed(seed)

    def draw(longest: int) -> Tensor:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.cat(
            [torch.randint(EOS + 1, WORDS, (length,), generator=generator), torch.tensor([EOS])]
        )

    source = tuple(draw(9) for _ in range(count))
    target = tuple(draw(12) for _ in range(count))
    texts = [tuple(Letters().decode(s.tolist()) for s in side) for side in (source, target)]
    return Sentences(texts[0], texts[1], source, target)


DATA = PairData(sentences(70, 1), sentences(9, 2), sentences(13, 3), Letters(), digest="")


def task_on(data: PairData = DATA, **changes: Any) -> TranslationTask:
    options: dict[str, Any] = {
        "workers": WORKERS,
        "worker_batch_size": SHARE,
        "seed": 5,
        "label_smoothing": 0.1,
    }
    return TranslationTask(data, device=CPU, **(options | changes))


def model_for(dropout: float = 0.0) -> Transformer:
    torch.manual_seed(2)
    return Transformer(WORDS, width=8, heads=2, layers=2, feedforward=12, dropout=dropout).double()


def numbers_of(batch: Pairs) -> list[int]:
    """Return which training pairs a batch holds."""
    found = []
    for source, target in zip(batch.source, batch.following, strict=True):
        pair = (source[source != PAD].tolist(), target[target != PAD].tolist())
        train = DATA.train
        found.append(
            next(
                i
                for i in range(len(train))
                if (train.source[i].tolist(), train.target[i].tolist()) == pair
            )
        )
    return found


def test_a_batch_is_a_function_of_worker_and_step_and_leaves_the_global_stream_alone() -> None:
    state = torch.get_rng_state()
    one, two = task_on(), task_on()
    places = [(worker, step) for step in range(20) for worker in range(WORKERS)]
    forwards = {place: one.batch(*place) for place in places}
    for place in reversed(places):
        assert all(
            torch.equal(a, b) for a, b in zip(forwards[place], two.batch(*place), strict=True)
        )
    assert all(
        torch.equal(a, b) for a, b in zip(one.extra_batch(1, 2), two.extra_batch(1, 2), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_takes_each_pair_once_at_most_in_another_order_each_time() -> None:
    task = task_on()
    assert task.steps_per_epoch == 70 // 8
    epochs = []
    for epoch in range(3):
        steps = range(epoch * task.steps_per_epoch, (epoch + 1) * task.steps_per_epoch)
        taken = [
            n
            for step in steps
            for worker in range(WORKERS)
            for n in numbers_of(task.batch(worker, step))
        ]
        assert len(taken) == len(set(taken)) == 64
        epochs.append(taken)
    assert len({tuple(taken) for taken in epochs}) == 3


def test_mini_batches_hold_sentences_of_similar_length_but_come_in_no_order_of_length() -> None:
    task = task_on()
    lengths = [
        [len(DATA.train.target[n]) for n in numbers_of(task.batch(0, step))] for step in range(8)
    ]
    assert sum(max(batch) - min(batch) for batch in lengths) < 8 * 2.5
    assert sorted(map(sum, lengths)) != list(map(sum, lengths))


def test_each_worker_goes_through_its_lengths_in_an_order_of_its_own() -> None:
    """Else all of them would have their longest sentences in the same step."""
    words = tuple(torch.full((length,), EOS + 1) for length in range(1, 65))
    texts = ("a",) * 64
    data = PairData(
        Sentences(texts, texts, words, words), DATA.validation, DATA.test, Letters(), digest=""
    )
    task = task_on(data)
    sums = [
        torch.tensor([(task.batch(k, step).following != PAD).sum() for step in range(8)])
        for k in range(WORKERS)
    ]
    assert all(len(one.unique()) == 8 for one in sums)
    assert sums[0].argsort().tolist() != sums[1].argsort().tolist()


def test_a_long_sentence_may_have_a_translation_of_twice_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[int] = []

    def watched(model: Any, source: Tensor, **options: Any) -> list[list[int]]:
        limits.extend(options["limits"].tolist())
        return [[] for _ in source]

    monkeypatch.setattr("egtrain.tasks.translation.beam_search", watched)
    task_on().translate(model_for(), "test", beam=2, length_penalty=1.0)
    assert sorted(limits) == sorted(2 * len(sentence) + 10 for sentence in DATA.test.source)


def test_filling_never_changes_a_sentence_and_never_counts() -> None:
    """The loss of a mini-batch is the mean over the subwords of its sentences, each alone and
    without filling.
    """
    task, model = task_on(), model_for()
    batch = task.batch(1, 3)
    nats, right, count = 0.0, 0, 0
    for n in numbers_of(batch):
        source, target = DATA.train.source[n][None], DATA.train.target[n]
        logits = model(source, torch.cat([torch.tensor([BOS]), target[:-1]])[None])[0].detach()
        log = logits.log_softmax(dim=1)
        # Szegedy et al. 2016: a tenth of the probability is spread over all subwords.
        wanted = 0.9 * F.one_hot(target, WORDS) + 0.1 / WORDS
        nats -= float((wanted * log).sum())
        right += int((logits.argmax(dim=1) == target).sum())
        count += len(target)
    loss, accuracy = task.loss(model, batch)
    assert math.isclose(loss.item(), nats / count, rel_tol=1e-6)
    assert math.isclose(float(accuracy), right / count, rel_tol=1e-6)
    assert loss.requires_grad
    assert not accuracy.requires_grad


def test_evaluation_adds_up_to_the_whole_split_whatever_its_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, model = task_on(), model_for()
    found = evaluate(task, model, "test", Ranks())
    translations = task.translate(model, "test", beam=1, length_penalty=1.0)
    assert math.isclose(
        found["bleu"],
        BLEU().corpus_score(translations, [list(DATA.test.target_text)]).score,
        abs_tol=1e-9,
    )
    nats = sum(
        F.cross_entropy(
            model(s[None], torch.cat([torch.tensor([BOS]), t[:-1]])[None])[0], t, reduction="sum"
        ).item()
        for s, t in zip(DATA.test.source, DATA.test.target, strict=True)
    )
    assert math.isclose(found["loss"], nats / sum(map(len, DATA.test.target)), rel_tol=1e-6)
    monkeypatch.setattr("egtrain.tasks.translation.EVALUATION_BATCH", 3)
    again = evaluate(task, model, "test", Ranks())
    assert task.evaluation_batches("test") == 5
    assert math.isclose(again["loss"], found["loss"], rel_tol=1e-9)
    assert math.isclose(again["bleu"], found["bleu"], abs_tol=1e-9)


def test_translations_keep_the_order_of_the_split_and_its_references_score_a_hundred() -> None:
    task, model = task_on(), model_for()
    model.train()
    both = task.translate(model, "validation", beam=3, length_penalty=1.0)
    assert model.training
    assert len(both) == 9
    turned = PairData(DATA.train, DATA.test, DATA.validation, Letters(), digest="")
    assert task_on(turned).translate(model, "test", beam=3, length_penalty=1.0) == both
    bleu, signature = task.score(DATA.test.target_text, "test")
    assert math.isclose(bleu, 100, abs_tol=1e-6)
    assert signature.startswith("nrefs:1|")


def test_frozen_batches_weigh_as_many_subwords_as_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("egtrain.tasks.translation.FROZEN_BATCH", 5)
    task, model = task_on(), model_for()
    chosen = torch.tensor([3, 8, 60, 1, 22, 17, 40])
    batches = task.frozen_batches(chosen)
    assert [n for batch, _ in batches for n in numbers_of(batch)] == chosen.tolist()
    assert [size for _, size in batches] == [
        sum(len(DATA.train.target[int(n)]) for n in part) for part in chosen.split(5)
    ]
    with (
        FrozenLoss(model, task.loss, batches) as split,
        FrozenLoss(model, task.loss, task.frozen_batches(chosen)) as whole,
    ):
        assert math.isclose(split.value()[0], whole.value()[0], rel_tol=1e-9)
        direction = [torch.ones_like(p) for p in split.parameters]
        assert all(torch.isfinite(part).all() for part in split.hessian_product(direction))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        UsageError, match="a batch of 20 x 4 = 80 is larger than the 70 training samples"
    ):
        task_on(workers=20)


# The model.


def test_translating_subword_by_subword_gives_the_logits_of_the_whole() -> None:
    model = model_for(dropout=0.3).eval()
    batch = task_on().batch(0, 0)
    whole = model(batch.source, batch.target)
    state = model.begin(batch.source)
    for place in range(batch.target.shape[1]):
        assert torch.allclose(
            model.step(batch.target[:, place], state), whole[:, place], rtol=1e-10, atol=1e-12
        )
        if place == 1:  # another order of the sentences, one of them twice
            rows = torch.tensor([2, 0, 3, 0])
            state.select(rows)
            whole, batch = whole[rows], Pairs(*(t[rows] for t in batch))


def positions(length: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5, with all sines before the cosines, one number at a time."""
    rates = [10_000 ** (-2 * i / width) for i in range(width // 2)]
    table = [
        [f(place * rate) for f in (math.sin, math.cos) for rate in rates] for place in range(length)
    ]
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_model_is_that_of_the_library_with_the_same_weights() -> None:
    model = model_for()
    reference = nn.Transformer(
        8, 2, 2, 2, 12, dropout=0.0, norm_first=True, batch_first=True, dtype=torch.float64
    )
    own = model.state_dict()

    def give(name: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            reference.get_parameter(f"{name}.{kind}").data.copy_(own[f"{ours}.{kind}"])

    def give_attention(name: str, ours: str) -> None:
        give(f"{name}.out_proj", f"{ours}.output")
        for kind in ("weight", "bias"):
            parts = [own[f"{ours}.{part}.{kind}"] for part in ("query", "key_value")]
            reference.get_parameter(f"{name}.in_proj_{kind}").data.copy_(torch.cat(parts))

    for side in ("encoder", "decoder"):
        give(f"{side}.norm", f"{side}_norm")
        for i in range(2):
            theirs, ours = f"{side}.layers.{i}", f"{side}.{i}"
            give_attention(f"{theirs}.self_attn", f"{ours}.attention")
            norms = ["attention_norm", "feedforward.norm"]
            if side == "decoder":
                give_attention(f"{theirs}.multihead_attn", f"{ours}.source_attention")
                norms.insert(1, "source_norm")
            for number, norm in enumerate(norms, start=1):
                give(f"{theirs}.norm{number}", f"{ours}.{norm}")
            give(f"{theirs}.linear1", f"{ours}.feedforward.inner")
            give(f"{theirs}.linear2", f"{ours}.feedforward.outer")

    batch = task_on().batch(0, 0)
    filling = batch.source == PAD
    assert bool(filling.any())
    embedding = model.embedding.weight
    source, target = (
        math.sqrt(8) * embedding[t] + positions(t.shape[1], 8) for t in (batch.source, batch.target)
    )
    after = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    found = reference(
        source,
        target,
        tgt_mask=after,
        src_key_padding_mask=filling,
        memory_key_padding_mask=filling,
    )
    # Our positions are float32.
    assert torch.allclose(
        model(batch.source, batch.target), found @ embedding.T, rtol=1e-5, atol=1e-6
    )


def test_a_place_of_the_target_sees_only_those_before_it() -> None:
    model = model_for()
    batch = task_on().batch(0, 0)
    changed = batch.target.clone()
    changed[:, -1] = EOS + 1
    before, after = model(batch.source, batch.target), model(batch.source, changed)
    assert torch.equal(before[:, :-1], after[:, :-1])


def test_the_model_has_no_state_that_workers_would_have_copies_of() -> None:
    assert not list(model_for().buffers())


def test_the_published_base_model_has_its_size() -> None:
    """Vaswani et al. 2017: 65 million with 37,000 subwords; pre-norm adds two normalisations."""
    model = Transformer(37_000, width=512, heads=8, layers=6, feedforward=2048, dropout=0.1)
    assert (
        sum(p.numel() for p in model.parameters())
        == 37_000 * 512 + 6 * (3_152_384 + 4_204_032) + 2 * 1024
    )
