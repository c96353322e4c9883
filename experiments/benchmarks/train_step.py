"""A training step of XNOR LeNet-5 or NIN: this library against PyTorch.

Both train the same recipe on the same images and cores, in turn in one process.
"""

import argparse
import dataclasses
import pickle
import re
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import measure

if TYPE_CHECKING:
    from xnor_jax.train.recipe import Recipe


class Plan(NamedTuple):
    """The settings of both sides, without the types of either framework."""

    model: str
    batch_size: int
    mean: Any
    std: Any


EPOCH_IMAGES = {"mnist-lenet5-reference": 60_000, "cifar10-nin-reference": 50_000}


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads)
    if args.alone:
        print(run_alone(args))
        return
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
    plan = plan_of(recipe)
    names = ("xnor_jax", "PyTorch")
    memory = {name: peak_memory(name, plan, images, labels) for name in names}
    makers = library_side(recipe, images, labels), torch_side(plan, images, labels)
    sides = dict(zip(names, makers, strict=True))
    # PyTorch's threads spin for a while after their last call.
    seconds = measure.in_turn(sides, args.rounds, pause=0.5)

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
    parser.add_argument("--plan", type=Path, help=SUPPRESS)
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


def plan_of(recipe: "Recipe") -> Plan:
    """The recipe's network and batch size, and its images' mean and deviation."""
    from xnor_jax.data import SOURCES

    source = SOURCES[recipe.dataset]
    return Plan(recipe.model, recipe.batch_size, source.mean, source.std)


def peak_memory(side: str, plan: Plan, images, labels) -> float:
    """The peak memory, in MB, of a process that imports and runs this side alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan"
        path.write_bytes(pickle.dumps((tuple(plan), images, labels)))
        command = [sys.executable, *sys.argv, "--alone", side, "--plan", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def run_alone(args: argparse.Namespace) -> int:
    """Run one side for two rounds; return the process's peak memory in KiB.

    The peak is the kernel's VmHWM: `getrusage` starts a child with its parent's peak.
    """
    fields, images, labels = pickle.loads(args.plan.read_bytes())
    if args.alone == "PyTorch":
        import torch

        torch.set_num_threads(args.threads)
        run = torch_side(Plan(*fields), images, labels)
    else:
        import jax

        from xnor_jax.train import recipe as recipes

        jax.config.update("jax_platforms", "cpu")
        recipe = dataclasses.replace(recipes.get(args.recipe), batch_size=args.batch)
        run = library_side(recipe, images, labels)
    run()
    run()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def load(args: argparse.Namespace):
    """Load the uint8 images `[N, H, W, C]` and the labels of one round's steps."""
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
    """A function that trains for one epoch on the images."""
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
    """The recipe's trainer and its initial state."""
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
    plan: Plan,
    images,
    labels,
    classes: int = 10,
    *,
    device: str = "cpu",
    compiled: bool = False,
) -> Callable[[], None]:
    """The same in PyTorch, with channels last on a GPU."""
    import torch
    import torch_reference

    gpu = device != "cpu"
    mean, std = (
        torch.tensor(a, device=device).reshape(-1, 1, 1) for a in (plan.mean, plan.std)
    )
    torch.manual_seed(0)
    net: torch.nn.Module = {
        "lenet5": torch_reference.LeNet5,
        "nin": torch_reference.NIN,
        "resnet18": partial(torch_reference.ResNet18, classes=classes),
    }[plan.model]()
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
        training.epoch(x, y, plan.batch_size, mean, std)
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
