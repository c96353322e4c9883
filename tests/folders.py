"""Datasets of random images on disk."""

import datasets
import numpy as np
from PIL import Image

NAMES = ("ant", "bee", "cat")


def draw(seed, size=(40, 30), mode="RGB"):
    """Draw an image; classes differ in grain, and seeds give different images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5 + 3 * (seed % 3), 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def class_folders(folder, *, train=20, test=7, names=("train", "validation")):
    """Write `train/ant/0000.jpg` …; test images are numbered from 1000."""
    for split, first, count in zip(names, (0, 1000), (train, test), strict=True):
        for number in range(first, first + count):
            place = folder / split / NAMES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            size = (30 + number % 20, 45 - number % 7)
            draw(number, size).save(place / f"{number:04}.jpg", quality=95)
    return folder


def parquet(folder, **splits):
    """Write the Hub's ImageNet layout: `split=[(image, label), …]`, -1 if hidden."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES))
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pictures, labels = zip(*rows, strict=True)
        table = datasets.Dataset.from_dict(
            {"image": list(pictures), "label": list(labels)}, features=features
        )
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
