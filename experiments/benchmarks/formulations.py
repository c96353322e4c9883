"""The formulations that the library chooses from, on the networks' shapes.

Times each convolution and max-pool of LeNet-5 and NIN, forward and with gradients, in
every available formulation, in turn in one process.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import measure

if TYPE_CHECKING:
    import jax


class Conv(NamedTuple):
    """A convolution of stride 1 on square images."""

    name: str
    size: int
    channels: int
    window: int
    features: int
    padding: int = 0
    first: bool = False  # its input is the image, which needs no gradient

    @property
    def binary(self) -> bool:
        return "block" in self.name

    def __str__(self) -> str:
        shape = f"{self.size}×{self.size}×{self.channels}"
        return f"{self.name}: {self.window}×{self.window}, {shape} → {self.features}"


class Pool(NamedTuple):
    """A max-pool on square images."""

    name: str
    size: int
    channels: int
    window: int
    stride: int
    padding: int = 0

    def __str__(self) -> str:
        shape = f"{self.size}×{self.size}×{self.channels}"
        return f"{self.name}: {self.window}/{self.stride}, {shape}"


CASES = (
    Conv("LeNet-5 conv1", 28, 1, 5, 20, first=True),
    Pool("LeNet-5 pool1", 24, 20, 2, 2),
    Conv("LeNet-5 block2", 12, 20, 5, 50),
    Pool("LeNet-5 pool2", 8, 50, 2, 2),
    Conv("NIN conv1", 32, 3, 5, 192, padding=2, first=True),
    Conv("NIN block2", 32, 192, 1, 160),
    Conv("NIN block3", 32, 160, 1, 96),
    Pool("NIN pool3", 32, 96, 3, 2, padding=1),
    Conv("NIN block4", 16, 96, 5, 192, padding=2),
    Conv("NIN block5, block6", 16, 192, 1, 192),
    Conv("NIN block7", 8, 192, 3, 192, padding=1),
    Conv("NIN block8", 8, 192, 1, 192),
    Conv("NIN conv9", 8, 192, 1, 10),
)

Function = Callable[..., "jax.Array"]


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads) if args.threads else None
    import jax

    device = jax.devices()[0]
    print(
        f"batch {args.batch}, float32, {args.rounds} rounds of {args.calls} calls, "
        f"{device.platform} ({device.device_kind})"
        + (f", threads: {len(cores)}" if cores else "")
    )
    print(f"cpu: {measure.describe_cpu()}")
    print(f"versions: jax {jax.__version__}\n")
    print(
        "| shape | formulation | forward, ms: median (min–max) "
        "| with gradients, ms: median (min–max) | ÷ picked |"
    )
    print("|---|---|---|---|---|")
    slower = []
    for case in CASES:
        if args.only not in str(case):
            continue
        ratios = compare(case, args)
        slower += [f"{case}, {name}" for name, ratio in ratios.items() if ratio < 1]
    print("\n`*`: what the library picks; the last column is of the last times.")
    print(f"Quicker than the pick, with gradients: {'; '.join(slower) or 'none'}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (
        ("batch", 128, "images (default 128)"),
        ("rounds", 5, "rounds (default 5)"),
        ("calls", 3, "calls of each formulation in a round (default 3)"),
        ("threads", None, "cores of the process; all that it may use without it"),
    ):
        parser.add_argument(
            f"--{name}", type=measure.positive, default=default, help=text
        )
    parser.add_argument(
        "--only", default="", help="the shapes whose line holds this text, such as NIN"
    )
    return parser.parse_args()


def compare(case: Conv | Pool, args: argparse.Namespace) -> dict[str, float]:
    """Print a case's rows; return each formulation's time relative to the pick's."""
    import jax

    functions = conv_functions(case) if isinstance(case, Conv) else pool_functions(case)
    operands, g = draw(case, functions, args.batch)
    chosen = picked(case, operands)
    fixed = isinstance(case, Conv) and case.first

    def with_gradients(function: Function, operands, g):
        # Return the value too, as in training: a product's gradients do not need it.
        if fixed:
            y, pullback = jax.vjp(partial(function, operands[0]), *operands[1:])
        else:
            y, pullback = jax.vjp(function, *operands)
        return y, pullback(g)

    def caller(function: Callable[..., object], *inputs) -> Callable[[], None]:
        compiled = jax.jit(function).lower(*inputs).compile()

        def run() -> None:
            for _ in range(args.calls):
                jax.block_until_ready(compiled(*inputs))

        return run

    def spreads(sides: dict[str, Callable[[], None]]) -> dict[str, measure.Spread]:
        return {
            name: measure.Spread.of([1000 * value / args.calls for value in values])
            for name, values in measure.in_turn(sides, args.rounds).items()
        }

    forward = spreads({n: caller(f, *operands) for n, f in functions.items()})
    training = spreads(
        {
            n: caller(partial(with_gradients, f), operands, g)
            for n, f in functions.items()
        }
    )
    ratios = {n: t.median / training[chosen].median for n, t in training.items()}
    for name in functions:
        mark = " `*`" if name == chosen else ""
        times = [
            f"{t.median:.2f} ({t.least:.2f}–{t.most:.2f})"
            for t in (forward[name], training[name])
        ]
        cells = [str(case), name + mark, *times, f"{ratios[name]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return ratios


def conv_functions(case: Conv) -> dict[str, Function]:
    import jax
    import jax.numpy as jnp

    from xnor_jax import convolution
    from xnor_jax.geometry import conv_geometry
    from xnor_jax.ops import cpu, training

    geometry = conv_geometry(
        "conv",
        (case.size,) * 2,
        (case.window,) * 2,
        strides=1,
        padding=case.padding,
    )
    xla = partial(convolution.xla_conv, **geometry.options)
    functions: dict[str, Function] = {"XLA convolution": xla}
    if cpu.is_available() and jax.default_backend() == "cpu":
        functions["C++"] = partial(training.conv, **geometry.options, backend="cpu")
        if case.binary:
            functions["C++, signs on bits"] = partial(
                training.binary_product, geometry=geometry, rule="ste", backend="cpu"
            )
    if case.window == 1:
        functions["dot"] = lambda x, kernel: jnp.matmul(x, kernel[0, 0])
        return functions

    def patches(x, kernel):
        x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
        return convolution._patch_conv(geometry, None, x, kernel)

    functions["patch product"] = patches
    return functions


def pool_functions(case: Pool) -> dict[str, Function]:
    import jax.numpy as jnp
    from jax import lax

    from xnor_jax import convolution

    geometry = pool_geometry(case)

    def reduce_window(x):
        return lax.reduce_window(
            x,
            -jnp.inf,
            lax.max,
            (1, *geometry.window, 1),
            (1, *geometry.strides, 1),
            ((0, 0), *geometry.padding, (0, 0)),
        )

    def shifted(x):
        return convolution.max_pool(x, geometry)

    return {"reduce_window": reduce_window, "shifted maxima": shifted}


def pool_geometry(case: Pool):
    from xnor_jax import geometry

    return geometry.pool_geometry(
        "pool",
        (case.size,) * 2,
        case.window,
        strides=case.stride,
        padding=case.padding,
    )


def draw(case: Conv | Pool, functions: dict[str, Function], batch: int):
    """Draw normal operands, and a gradient of the result's shape."""
    import jax

    keys = iter(jax.random.split(jax.random.key(0), 3))
    shapes = [(batch, case.size, case.size, case.channels)]
    if isinstance(case, Conv):
        shapes.append((case.window, case.window, case.channels, case.features))
    operands = [jax.random.normal(next(keys), shape) for shape in shapes]
    out = jax.eval_shape(next(iter(functions.values())), *operands)
    return operands, jax.random.normal(next(keys), out.shape)


def picked(case: Conv | Pool, operands) -> str:
    """The formulation that the library runs here, from its lowered program."""
    import jax

    from xnor_jax import convolution
    from xnor_jax.ops import training

    if isinstance(case, Pool):
        function = partial(convolution.max_pool, geometry=pool_geometry(case))
    else:
        function = partial(
            training.conv,
            strides=(1, 1),
            padding=((case.padding, case.padding),) * 2,
            dilation=(1, 1),
        )
    program = jax.jit(function).lower(*operands).as_text()
    if isinstance(case, Pool):
        return "reduce_window" if "reduce_window" in program else "shifted maxima"
    if "xnor_jax_run" in program:
        return "C++, signs on bits" if case.binary else "C++"
    if "stablehlo.convolution" in program:
        return "XLA convolution"
    return "dot" if case.window == 1 else "patch product"


if __name__ == "__main__":
    main()
