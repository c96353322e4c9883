"""A training step of XNOR LeNet-5 or NIN: this library beside PyTorch.

Both train the same recipe on the same images, on the same cores, in turn in one
process.
"""

import argparse
import dataclasses
import resource
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import measure

if TYPE_CHECKING:
    from xnor_jax.train.recipe import Recipe

EPOCH_IMAGES = {"mnist-lenet5-reference": 60_000, "cifar10-nin-reference": 50_000}


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads)
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit("train_step needs PyTorch: pip install 'xnor-jax[experiments]'")
    import jax

    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(args.threads)

    cpu = measure.describe_cpu()
    from xnor_jax.train import recipe as recipes

    images, labels = load(args)
    recipe = dataclasses.replace(recipes.get(args.recipe), batch_size=args.batch)
    makers = {"xnor_jax": library_side, "PyTorch": torch_side}
    if args.alone:
        run = makers[args.alone](recipe, images, labels)
        run()
        run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    memory = {name: peak_memory(name) for name in makers}
    sides = {name: make(recipe, images, labels) for name, make in makers.items()}
    seconds = measure.in_turn(sides, args.rounds)

    print(
        f"{args.recipe}, batch {args.batch}, {args.rounds} rounds of {args.steps} "
        f"steps a side, threads: {args.threads} (cores: {', '.join(map(str, cores))})"
    )
    print(f"images: {args.data_dir.name if args.data_dir else 'random'}")
    print(f"cpu: {cpu}")
    print(f"versions: {versions()}\n")
    epoch_steps = EPOCH_IMAGES[args.recipe] // args.batch
    print(
        f"| side | ms a step: median | min | max | s an epoch, {epoch_steps} steps "
        "| peak memory, MB |"
    )
    print("|---|---|---|---|---|---|")
    for name, values in seconds.items():
        step = measure.Spread.of([value / args.steps for value in values])
        times = " | ".join(f"{1000 * value:.2f}" for value in step)
        epoch = step.median * epoch_steps
        print(f"| {name} | {times} | {epoch:.2f} | {memory[name]:.0f} |")
    pairs = zip(seconds["xnor_jax"], seconds["PyTorch"], strict=True)
    ratio = measure.Spread.of([ours / theirs for ours, theirs in pairs])
    print(
        f"\nratio xnor_jax / PyTorch: {ratio.median:.3f}, median of the rounds "
        f"({ratio.least:.3f} to {ratio.most:.3f})"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe",
        choices=EPOCH_IMAGES,
        default="mnist-lenet5-reference",
        help="what both sides train (default %(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="its data in the layout of the Hugging Face hub; random images without it",
    )
    for name, default, text in (
        ("steps", 100, "steps a side in each round"),
        ("rounds", 5, "rounds"),
        ("threads", 2, "cores of the process, and threads of either side"),
        ("batch", 128, "images a step"),
    ):
        parser.add_argument(
            f"--{name}",
            type=measure.positive,
            default=default,
            help=f"{text} (default {default})",
        )
    parser.add_argument("--alone", choices=("xnor_jax", "PyTorch"), help=SUPPRESS)
    args = parser.parse_args()
    if args.batch == 1:
        parser.error("argument --batch: BatchNorm needs at least 2 images")
    most = EPOCH_IMAGES[args.recipe] // args.batch
    if args.steps > most:
        parser.error(
            f"argument --steps: expected at most {most}, an epoch of batch "
            f"{args.batch}, got {args.steps}"
        )
    return args


def peak_memory(side: str) -> float:
    """The most memory, in MB, of a process that runs this side alone."""
    command = [sys.executable, *sys.argv, "--alone", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def load(args: argparse.Namespace):
    """As many uint8 images `[N, H, W, C]` as a round's steps need, and labels."""
    import numpy as np

    from xnor_jax import data
    from xnor_jax.train import recipe as recipes

    dataset = recipes.get(args.recipe).dataset
    shape = (28, 28, 1) if dataset == "mnist" else (32, 32, 3)
    count = args.steps * args.batch
    if args.data_dir is None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        return images, rng.integers(0, 10, count, np.int32)
    try:
        train = data.load(dataset, args.data_dir).train
    except data.DataError as error:
        sys.exit(str(error))
    if len(train.labels) < count:
        sys.exit(
            f"--data-dir: expected at least {count} training images, found "
            f"{len(train.labels)}"
        )
    return train.images[:count], train.labels[:count]


def library_side(recipe: "Recipe", images, labels, classes=10) -> Callable[[], None]:
    """A function that trains for as many steps as there are batches of images."""
    import jax
    import jax.numpy as jnp

    from xnor_jax.train import step

    trainer, state = create(recipe, images.shape[1:], classes)
    epoch = step.make_train_epoch(trainer)
    x, y = jnp.asarray(images), jnp.asarray(labels)
    key = jax.random.key(0)

    def run() -> None:
        nonlocal state, key
        key, order = jax.random.split(key)
        state, metrics, _ = epoch(state, x, y, order)
        jax.block_until_ready((state, metrics))

    return run


def create(recipe: "Recipe", image_shape, classes: int, backend: str = "auto"):
    """The recipe's trainer and its first state."""
    from xnor_jax.data import SOURCES
    from xnor_jax.train import step

    return step.create(
        recipe,
        SOURCES[recipe.dataset],
        image_shape=image_shape,
        classes=classes,
        steps_per_epoch=50_000 // recipe.batch_size,
        backend=backend,
    )


def torch_side(
    recipe: "Recipe",
    images,
    labels,
    classes: int = 10,
    *,
    device: str = "cpu",
    compiled: bool = False,
) -> Callable[[], None]:
    """The same in PyTorch; on a GPU with the channels last."""
    import torch
    import torch_reference

    from xnor_jax.data import SOURCES

    source, gpu = SOURCES[recipe.dataset], device != "cpu"
    mean, std = (
        torch.tensor(a, device=device).reshape(-1, 1, 1)
        for a in (source.mean, source.std)
    )
    torch.manual_seed(0)
    net: torch.nn.Module = {
        "lenet5": torch_reference.LeNet5,
        "nin": torch_reference.NIN,
        "resnet18": partial(torch_reference.ResNet18, classes=classes),
    }[recipe.model]()
    x = torch.tensor(images.transpose(0, 3, 1, 2), device=device)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    net = net.to(device)
    if gpu:
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    training = torch_reference.Training(net)
    if compiled:
        net.compile()

    def run() -> None:
        training.epoch(x, y, recipe.batch_size, mean, std)
        if gpu:
            torch.cuda.synchronize()

    return run


def versions() -> str:
    from importlib.metadata import version
    from platform import python_version

    import xnor_jax

    packages = ("jax", "jaxlib", "flax", "optax", "torch")
    others = [f"{name} {version(name)}" for name in packages]
    return ", ".join(
        [f"xnor_jax {xnor_jax.__version__}", *others, f"python {python_version()}"]
    )


if __name__ == "__main__":
    main()
