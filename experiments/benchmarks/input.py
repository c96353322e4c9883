"""Pictures from disk: the input pipeline's speed, and the time a step waits for it.

Writes a few thousand JPEGs to class folders in a temporary folder, prepares them in
threads and in worker processes, and trains networks on them.
"""

import argparse
import dataclasses
import io
import os
import tempfile
from pathlib import Path
from time import perf_counter

import measure


def main() -> None:
    args = parse()
    print(f"cpu: {measure.describe_cpu()}; cores: {len(os.sched_getaffinity(0))}")
    print(f"versions: {measure.versions('grain', 'datasets', 'pillow')}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = f"{scratch}/cache"
        pictures = Path(scratch) / "pictures"
        draw(pictures, args.images, args.side)
        size = sum(path.stat().st_size for path in pictures.rglob("*.jpg"))
        print(
            f"{args.images} training pictures of {args.side}×{args.side}, with a tenth "
            f"as many test pictures {size / 1e6:.0f} MB as JPEGs\n"
        )
        if not args.no_pipeline:
            pipeline(pictures, args)
        for model in args.train:
            train(model, pictures, Path(scratch) / model, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (
        ("images", 4000, "training pictures"),
        ("side", 256, "pixels a side of a picture"),
        ("image-size", 64, "pixels a side of what the network sees"),
        ("batch", 128, "pictures a batch"),
        ("rounds", 5, "times that the pictures are prepared"),
        ("epochs", 2, "of training"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(
            f"--{name}", type=measure.positive, default=default, help=text
        )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", nargs="*", default=["nin"], help="networks")
    parser.add_argument("--no-pipeline", action="store_true", help="only train")
    return parser.parse_args()


def draw(folder: Path, images: int, side: int) -> None:
    """Write coarse random textures as JPEGs about as large as photographs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("validation", max(images // 10, 10))):
        for number in range(count):
            place = folder / split / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            grain = 16 + 6 * (number % 10)
            pixels = rng.integers(0, 256, (grain, grain, 3), np.uint8)
            picture = Image.fromarray(pixels).resize((side, side))
            picture.save(place / f"{number}.jpg", quality=90)


def open_set(folder: Path, args: argparse.Namespace):
    from xnor_jax import data
    from xnor_jax.train import recipe as recipes

    recipe = dataclasses.replace(
        recipes.get("folder-nin"), image_size=args.image_size, batch_size=args.batch
    )
    return data.load(recipe.dataset, folder, recipe.fit), recipe


def pipeline(folder: Path, args: argparse.Namespace) -> None:
    """Print the images per second of the training pipeline alone."""
    from xnor_jax.data import Augment, streams

    dataset, recipe = open_set(folder, args)
    augment = Augment(recipe.resize_crop, recipe.shift, recipe.flip)
    epoch = dataset.train_batches(args.batch, seed=0, augment=augment)
    before = resident()
    print("| workers | first batch, s | images/s: median | min | max |")
    print("|---|---|---|---|---|")
    for workers in args.workers:
        rates = []
        start = perf_counter()
        with streams.reading(epoch.repeat(args.rounds + 1), workers) as batches:
            next(batches)
            first = perf_counter() - start
            for _ in range(len(epoch) - 1):
                next(batches)  # until all workers have started
            for _ in range(args.rounds):
                start = perf_counter()
                for _ in range(len(epoch)):
                    next(batches)
                rates.append(len(epoch) * args.batch / (perf_counter() - start))
        rate = " | ".join(f"{value:,.0f}" for value in measure.Spread.of(rates))
        name = workers or "0 (threads)"
        print(f"| {name} | {first:.1f} | {rate} |", flush=True)
    grown, decoded = resident() - before, args.images * args.side**2 * 3
    print(
        f"\nthis process grew by {grown / 1e6:.0f} MB; the set's pixels are "
        f"{decoded / 1e6:.0f} MB\n",
        flush=True,
    )


def train(model: str, folder: Path, run: Path, args: argparse.Namespace) -> None:
    """Train as `xnor-jax train folder-nin` does, in this process."""
    from rich.console import Console

    from xnor_jax.train import loop
    from xnor_jax.train.folder import RunInfo

    dataset, recipe = open_set(folder, args)
    recipe = dataclasses.replace(recipe, model=model, epochs=args.epochs)
    info = RunInfo.of(model, recipe, dataset)
    for workers in args.workers:
        place = run.with_name(f"{model}-{workers}")
        console = Console(file=io.StringIO())
        result = loop.train(info, dataset, place, console=console, workers=workers)
        for record in result.history:
            print(
                f"{model} at {recipe.image_size}×{recipe.image_size}, {workers} "
                f"workers, epoch {record['epoch']}: "
                f"{record['images_per_second']:,.0f} images/s, "
                f"{record['data_wait']:.2%} of the time waiting for data",
                flush=True,
            )


def resident() -> int:
    """The resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
