"""Train a network of torchvision on a folder of images, which are read while it trains.

egtrain train --task image_folder.py --preset eg-adam --batch-size 64 \
    --set worker_batch_size=16 --set task.folder=stripes --set task.classes=3 \
    --set task.image_size=32 --set task.smallest_crop=0.5 --set task.net=resnet18 \
    --set schedule.decay=cosine --set schedule.warmup_epochs=1 --set threads=1 --epochs 6 \
    --output runs/folder

The default is ResNet-50 on images of 224 x 224 pixels. Those of a class lie in FOLDER/train/CLASS
and FOLDER/val/CLASS. --set data.loaders=8 reads them in eight processes, to keep a GPU busy.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2 as transforms

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels, from 0 to 1


def model(net: str = "resnet50", classes: int = 1000):
    """Return any classifier that torchvision knows, with random weights."""
    return get_model(net, num_classes=classes)


def dataset(split, folder: str = "imagenet", image_size: int = 224, smallest_crop: float = 0.08):
    """Return the images of a split: cropped and flipped at random for training."""
    if split == "validation":
        return None  # none of its own: data.validation=N holds out training images
    if split == "train":
        steps = [
            transforms.RandomResizedCrop(image_size, scale=(smallest_crop, 1)),
            transforms.RandomHorizontalFlip(),
        ]
    else:
        steps = [
            transforms.Resize(image_size * 8 // 7),  # 256 for 224
            transforms.CenterCrop(image_size),
        ]
    steps += [
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(MEAN, STD),
    ]
    part = "train" if split == "train" else "val"
    return ImageFolder(Path(folder, part), transforms.Compose(steps))


def loss(model, batch, label_smoothing: float = 0.0):
    images, labels = batch
    logits = model(images)
    smoothing = label_smoothing if model.training else 0.0
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    mean_loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return mean_loss, {"accuracy": accuracy}
