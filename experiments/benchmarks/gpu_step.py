"""Training steps of NIN and XNOR-ResNet-18 on a GPU: this library against PyTorch.

Measures step times, in turn in one process, their share of the speed of the device's
matrix product, the time of each operation, and an epoch of CIFAR-10's size.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import measure
import train_step

OURS = {"xnor_jax, float32": "float32", "xnor_jax, bfloat16": "bfloat16"}


class Case(NamedTuple):
    """A network and its training batches."""

    name: str
    model: str
    image_shape: tuple[int, int, int]
    classes: int
    batch: int
    steps: int  # in a round

    def __str__(self) -> str:
        shape = "×".join(map(str, self.image_shape))
        return f"{self.name}, {shape}, batch {self.batch}"


CASES = (
    Case("NIN", "nin", (32, 32, 3), 10, 128, 50),
    Case("NIN", "nin", (32, 32, 3), 10, 1024, 10),
    Case("XNOR-ResNet-18", "resnet18", (224, 224, 3), 1000, 128, 5),
)
TINY = (
    Case("NIN", "nin", (8, 8, 3), 10, 4, 1),
    Case("XNOR-ResNet-18", "resnet18", (16, 16, 3), 7, 2, 1),
)


def main() -> None:
    args = parse()
    # Two frameworks share the device's memory: neither may preallocate all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    on_gpu = jax.default_backend() == "gpu"
    if not (on_gpu or args.tiny):
        sys.exit(
            "gpu_step: expected a GPU that JAX can use, found "
            f"{jax.default_backend()}; --tiny runs small sizes on any device"
        )
    if not args.alone:
        prepare_torch(on_gpu)
    others = () if args.alone else ("torch",)
    print(f"device: {jax.devices()[0].device_kind}; {measure.versions(*others)}")
    if not on_gpu:
        print("no GPU: these figures say only that the script runs")

    cases = [c for c in (TINY if args.tiny else CASES) if args.only in str(c)]
    if not cases:
        sys.exit(f"--only: expected a part of NIN or XNOR-ResNet-18, got {args.only!r}")
    peaks = peak(256 if args.tiny else 8192, args.rounds)
    for case in cases:
        sides = compare(case, peaks, args.rounds, alone=args.alone, on_gpu=on_gpu)
        name = list(OURS)[-1]
        print(f"\n{case}, {name}: where the time goes, steps: {case.steps}")
        profile(sides[name])
    if cases[0].model == "nin":
        epoch(cases[0], 8 if args.tiny else 50_000, args.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=measure.positive, default=7, help="rounds (default 7)"
    )
    parser.add_argument(
        "--only", default="", help="the cases whose line holds this text, such as NIN"
    )
    parser.add_argument("--alone", action="store_true", help="leave PyTorch out")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, on any device: a test"
    )
    return parser.parse_args()


def prepare_torch(on_gpu: bool) -> None:
    measure.need("torch")
    import torch

    if on_gpu and not torch.cuda.is_available():
        sys.exit(
            "gpu_step: expected a PyTorch that can use the GPU, found "
            f"{torch.__version__}; --alone leaves it out"
        )
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def peak(size: int, rounds: int) -> dict[str, float]:
    """Print and return the FLOP/s of a large matrix product in each dtype."""
    import jax
    import jax.numpy as jnp

    sides, product = {}, jax.jit(jnp.matmul)
    for name in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (size, size), name)

        def run(a=a) -> None:
            jax.block_until_ready([product(a, a) for _ in range(10)])

        sides[name] = run
    times = measure.in_turn(sides, rounds)
    found = {
        name: 20 * size**3 / measure.Spread.of(values).median
        for name, values in times.items()
    }
    rates = ", ".join(f"{n} {v / 1e12:.1f} TFLOP/s" for n, v in found.items())
    # At JAX's default precision, a GPU computes float32 products in TF32.
    print(f"product of {size}×{size} matrices: {rates}")
    return found


def compare(
    case: Case, peaks: dict[str, float], rounds: int, *, alone: bool, on_gpu: bool
) -> dict[str, Callable[[], None]]:
    """Print a table of all sides' steps; return the compiled sides."""
    images, labels = draw(case)
    sides = {name: library(case, dtype) for name, dtype in OURS.items()}
    if not alone:
        label = "PyTorch, channels last, TF32, compiled" if on_gpu else "PyTorch"
        sides[label] = train_step.torch_side(
            train_step.plan_of(recipe(case)),
            images,
            labels,
            case.classes,
            device="cuda" if on_gpu else "cpu",
            compiled=on_gpu,
        )
    times = measure.in_turn(sides, rounds)
    work = flops(case)
    print(f"\n{case}: {work / 1e9:.1f} GFLOP a step, {rounds} rounds of {case.steps}")
    print("| side | ms a step: median | min | max | images/s | of the peak | ÷ first |")
    print("|---|---|---|---|---|---|---|")
    first = next(iter(times.values()))
    for name, values in times.items():
        step = measure.Spread.of([value / case.steps for value in values])
        cells = [
            *(f"{1000 * value:.2f}" for value in step),
            f"{case.batch / step.median:,.0f}",
            f"{work / step.median / peaks[OURS.get(name, 'float32')]:.1%}",
            f"{measure.ratios(first, values).median:.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return sides


def recipe(case: Case, compute_dtype: str = "float32"):
    from xnor_jax.train import recipe as recipes

    return dataclasses.replace(
        recipes.get("cifar10-nin-reference"),
        model=case.model,
        batch_size=case.batch,
        compute_dtype=compute_dtype,
    )


def draw(case: Case):
    """Draw random images and labels for the steps of one round."""
    import numpy as np

    rng = np.random.default_rng(0)
    count = case.steps * case.batch
    images = rng.integers(0, 256, (count, *case.image_shape), np.uint8)
    return images, rng.integers(0, case.classes, count, np.int32)


def library(case: Case, compute_dtype: str) -> Callable[[], None]:
    return train_step.library_side(
        recipe(case, compute_dtype), *draw(case), case.classes
    )


def flops(case: Case) -> float:
    """XLA's count of a step's FLOPs, nearly all of them in products."""
    import jax
    import jax.numpy as jnp

    from xnor_jax.train import step

    # On the float backend: XLA counts no FLOPs in calls into the C++ library.
    trainer, state = train_step.create(
        recipe(case), case.image_shape, case.classes, "float"
    )
    x = jax.ShapeDtypeStruct((case.batch, *case.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    one = jax.jit(lambda *args: step.train_step(trainer, *args))
    return one.lower(state, x, labels).cost_analysis()["flops"]


def profile(run: Callable[[], None], rows: int = 15) -> None:
    """Print the time of each operation in a call, from the device's trace."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    nanoseconds: Counter[str] = Counter()
    for plane in devices or planes:
        for line in plane.lines:
            # A GPU's kernels are on one line per stream; other lines repeat them.
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if event.name.startswith("$"):  # a Python frame
                    continue
                nanoseconds[event.name] += event.duration_ns
    total = nanoseconds.total()
    print("| operation | ms | share |")
    print("|---|---|---|")
    for name, spent in nanoseconds.most_common(rows):
        print(f"| {name[:60]} | {spent / 1e6:.3f} | {spent / total:.1%} |")
    rest = total - sum(spent for _, spent in nanoseconds.most_common(rows))
    print(f"| the others | {rest / 1e6:.3f} | {rest / max(total, 1):.1%} |")


def epoch(case: Case, images: int, rounds: int) -> None:
    """Print the time of an epoch with all images on the device."""
    whole = case._replace(steps=images // case.batch)
    times = measure.in_turn({n: library(whole, d) for n, d in OURS.items()}, rounds)
    print(f"\n{case}: an epoch of {images:,} images that lie on the device")
    print("| side | s: median | min | max |")
    print("|---|---|---|---|")
    for name, values in times.items():
        spread = " | ".join(f"{value:.3f}" for value in measure.Spread.of(values))
        print(f"| {name} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
