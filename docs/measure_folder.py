"""Measure how long a folder of images takes at first and again; for docs/data.md.

python docs/measure_folder.py
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from egtrain.data.images import load_images

COUNT, SIZE = 2000, 256


def main() -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        for number in range(COUNT):
            split = "test" if number % 10 == 0 else "train"
            path = Path(name, "images", split, str(number % 7), f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8))
            small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path, quality=90)
        for what in ("at first", "again"):
            start = time.perf_counter()
            load_images(
                f"folder:{name}/images",
                data_dir=None,
                offline=True,
                train_samples=None,
                validation=0,
            )
            print(
                f"{COUNT:,} JPEGs of {SIZE} x {SIZE}, {what}: {time.perf_counter() - start:.2f} s"
            )


if __name__ == "__main__":
    main()
