"""Two formulations of a convolution's input gradient, and the one the library uses.

They are the transposed convolution and col2im: see `xnor_jax.ops.gradients`. Both are
timed in turn in one process, on the networks' shapes and others.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import measure


class Case(NamedTuple):
    """A convolution of square images."""

    name: str
    size: int
    channels: int
    window: int
    features: int
    padding: int = 0
    stride: int = 1

    def __str__(self) -> str:
        shape = f"{self.size}×{self.size}×{self.channels} → {self.features}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.name}: {self.window}×{self.window}{stride}, {shape}"


CASES = (
    Case("LeNet-5 block2", 12, 20, 5, 50),
    Case("NIN block4", 16, 96, 5, 192, padding=2),
    Case("NIN block7", 8, 192, 3, 192, padding=1),
    Case("ResNet-18 stage 1", 56, 64, 3, 64, padding=1),
    Case("ResNet-18 stage 2", 56, 64, 3, 128, padding=1, stride=2),
    Case("ResNet-18 shortcut 2", 56, 64, 1, 128, stride=2),
    Case("ResNet-18 stage 4", 14, 256, 3, 512, padding=1, stride=2),
    Case("narrow", 32, 16, 3, 16, padding=1),
    Case("between", 24, 40, 3, 40, padding=1),
    Case("unpadded", 24, 100, 3, 100),
)


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from xnor_jax.ops import gradients

    print(
        f"batch {args.batch}, float32, {args.rounds} rounds, threads: {len(cores)}\n"
        f"cpu: {measure.describe_cpu()}\nversions: {measure.versions()}\n"
    )
    print("| shape | transposed, ms | col2im, ms | col2im ÷ transposed | taken |")
    print("|---|---|---|---|---|")
    for case in CASES:
        geometry, g, kernel = draw(case, args.batch)
        ways = {"transposed": gradients.transposed, "col2im": gradients.col2im}
        sides = {
            name: caller(partial(way, geometry), g, kernel)
            for name, way in ways.items()
        }
        seconds = measure.in_turn(sides, args.rounds)
        times = {name: measure.Spread.of(values) for name, values in seconds.items()}
        pairs = zip(seconds["col2im"], seconds["transposed"], strict=True)
        ratio = measure.Spread.of([a / b for a, b in pairs])
        cells = [f"{1000 * time.median:.2f}" for time in times.values()]
        taken = "col2im" if gradients.takes_col2im(geometry, kernel) else "transposed"
        print(
            f"| {case} | {' | '.join(cells)} | {ratio.median:.2f} | {taken} |",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (
        ("batch", 64, "images"),
        ("rounds", 7, "rounds of a call each"),
        ("threads", 2, "cores of the process"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(
            f"--{name}", type=measure.positive, default=default, help=text
        )
    return parser.parse_args()


def draw(case: Case, batch: int):
    """Draw the geometry, a gradient of the result's shape and a kernel."""
    import jax

    from xnor_jax.geometry import Geometry

    pads = ((case.padding,) * 2,) * 2
    sizes = ((case.size,) * 2, (case.window,) * 2, (case.stride,) * 2)
    geometry = Geometry(*sizes, pads, (1, 1))
    keys = jax.random.split(jax.random.key(0))
    g = jax.random.normal(keys[0], (batch, *geometry.out, case.features))
    shape = (case.window, case.window, case.channels, case.features)
    return geometry, g, jax.random.normal(keys[1], shape)


def caller(function: Callable[..., object], *inputs) -> Callable[[], None]:
    import jax

    compiled = jax.jit(function).lower(*inputs).compile()

    def run() -> None:
        jax.block_until_ready(compiled(*inputs))

    run()
    return run


if __name__ == "__main__":
    main()
