"""Fine-tune a text classifier of Hugging Face on sentences with labels.

egtrain train --task finetune_classifier.py --preset eg-adam --batch-size 64 \
    --set worker_batch_size=16 --set schedule.decay=cosine --set schedule.warmup_epochs=1 \
    --set threads=1 --epochs 8 --output runs/classifier

The default is a small DistilBERT with random weights. With --set task.checkpoint=NAME it begins
with the trained weights and the tokenizer of that name. Put texts of yours in place of `reviews`.
"""

import random
from functools import lru_cache

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LABELS = ["negative", "positive"]
THINGS = ["food", "wine", "waiter", "soup", "bill", "music", "dessert", "cook"]
PRAISE, BLAME = ["good", "fresh", "friendly", "fair"], ["bad", "stale", "rude", "high"]
KEEPING, TURNING = ["really", "very", "just"], ["not", "never", "hardly"]
TIMES = ["", "on monday", "in the evening", "when we came"]


def reviews(split, count):
    """Return (text, label) pairs: 'not bad' is positive, so no word decides by itself."""
    source, samples = random.Random(split), []
    for _ in range(count):
        praising, keeping = source.choice([True, False]), source.choice([True, False])
        adverb = source.choice(KEEPING if keeping else TURNING)
        word = source.choice(PRAISE if praising else BLAME)
        text = f"{source.choice(TIMES)} the {source.choice(THINGS)} was {adverb} {word}"
        samples.append((text, int(praising == keeping)))
    return samples


@lru_cache
def tokenizer(checkpoint):
    if checkpoint:
        return transformers.AutoTokenizer.from_pretrained(checkpoint)
    words = sorted({word for text, _ in reviews("train", 1000) for word in text.split()})
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    splitter = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="[PAD]", unk_token="[UNK]"
    )


def model(checkpoint: str = "", width: int = 64, layers: int = 2, freeze_embeddings: bool = False):
    names = dict(enumerate(LABELS))
    classifier = transformers.AutoModelForSequenceClassification
    if checkpoint:
        net = classifier.from_pretrained(checkpoint, id2label=names)
    else:
        small = {"dim": width, "hidden_dim": 2 * width, "n_layers": layers, "n_heads": 4}
        small |= {"vocab_size": len(tokenizer("")), "initializer_range": 0.1}
        net = classifier.from_config(transformers.DistilBertConfig(**small, id2label=names))
    net.get_input_embeddings().requires_grad_(not freeze_embeddings)
    return net


def dataset(split, samples: int = 4000):
    return reviews(split, samples if split == "train" else 1000)  # a list is a data set too


def collate(samples, checkpoint: str = ""):
    texts, labels = zip(*samples, strict=True)
    batch = tokenizer(checkpoint)(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}  # input_ids, attention_mask, labels


def loss(model, batch):
    output = model(**batch)  # the mean cross-entropy and the logits
    correct = output.logits.argmax(dim=1) == batch["labels"]
    return output.loss, {"accuracy": correct.float().mean()}


def decode(model, batch):
    return [LABELS[number] for number in model(**batch).logits.argmax(dim=1)]
