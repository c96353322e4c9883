"""Packed inference on a GPU: the time of each backend of `ops`.

Times layers and whole networks on all backends, in turn in one process; `float` is
cuDNN and cuBLAS on signs in float32. The fastest backend for a shape is the one that
`backend="auto"` should use there.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import measure

BACKENDS = ("float", "xla", "gpu", "pallas")
# Image (height, width, channels) and kernel of NIN's and XNOR-ResNet-18's layers.
LAYERS = {
    "NIN block4": ((16, 16, 96), (5, 5, 96, 192)),
    "NIN block5": ((16, 16, 192), (1, 1, 192, 192)),
    "NIN block7": ((8, 8, 192), (3, 3, 192, 192)),
    "ResNet-18 stage 1": ((56, 56, 64), (3, 3, 64, 64)),
    "ResNet-18 stage 4": ((7, 7, 512), (3, 3, 512, 512)),
}
NETWORKS = {"LeNet5": (28, 28, 1), "NIN": (32, 32, 3), "ResNet18": (224, 224, 3)}
TINY_LAYERS = {"tiny": ((4, 4, 40), (3, 3, 40, 33))}
TINY_NETWORKS = {"LeNet5": (28, 28, 1)}


def main() -> None:
    args = parse()
    import jax

    if not (jax.default_backend() == "gpu" or args.tiny):
        sys.exit(
            "gpu_packed: expected a GPU that JAX can use, found "
            f"{jax.default_backend()}; --tiny runs small sizes on any device"
        )
    print(f"device: {jax.devices()[0].device_kind}; {measure.versions()}")
    if jax.default_backend() != "gpu":
        print("no GPU: these figures say only that the script runs")
    print(f"rounds: {args.rounds}, about {args.seconds} s a side")
    compared = partial(compare, rounds=args.rounds, seconds=args.seconds)
    print("\nµs a call, the median of the rounds; in bold the least")
    print(f"| what | batch | {' | '.join(BACKENDS)} |")
    print("|---|---" + "|---" * len(BACKENDS) + "|")
    for batch in (2,) if args.tiny else args.batch:
        for name in TINY_LAYERS if args.tiny else LAYERS:
            compared(name, batch, layer(*(LAYERS | TINY_LAYERS)[name], batch))
        for name in TINY_NETWORKS if args.tiny else NETWORKS:
            compared(f"{name}, packed", batch, network(name, batch))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=measure.positive, default=7)
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="length of a side's turn"
    )
    parser.add_argument(
        "--batch", nargs="+", type=measure.positive, default=[1, 128], help="images"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, on any device: a test"
    )
    return parser.parse_args()


def layer(
    image: tuple[int, ...], kernel: tuple[int, ...], batch: int
) -> dict[str, Callable[[], Any]]:
    """A packed convolution of packed images into sums, for each backend."""
    import jax
    import jax.numpy as jnp

    from xnor_jax import ops

    key, other = jax.random.split(jax.random.key(0))
    x = ops.sign_bits(jax.random.normal(key, (batch, *image)), backend="xla")
    packed = ops.pack_kernel(jax.random.normal(other, kernel))

    def run(x, packed, backend: str):
        return ops.packed_conv(
            x, packed, ops.Sums(), strides=1, padding="SAME", backend=backend
        )

    calls = {b: jax.jit(partial(run, backend=b)) for b in BACKENDS}
    results = [call(x, packed) for call in calls.values()]
    if not all(jnp.array_equal(results[0], result) for result in results):
        sys.exit(f"gpu_packed: the backends' sums differ: {image}, {kernel}")
    return {name: partial(wait, call, x, packed) for name, call in calls.items()}


def network(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    """A packed network with random kernels, for each backend."""
    import jax
    from flax import nnx

    import xnor_jax as xnor

    shape = NETWORKS[name]
    model = getattr(xnor.models, name)(image_shape=shape, rngs=nnx.Rngs(0))
    model.eval()
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    packed = xnor.pack(model, example=x[:1])
    # The network is an argument: XLA would unpack a constant at compile time.
    call = jax.jit(lambda packed, x: packed(x))
    return {b: partial(wait, call, packed.with_backend(b), x) for b in BACKENDS}


def wait(call: Callable[..., Any], *args: Any) -> None:
    import jax

    jax.block_until_ready(call(*args))


def compare(
    name: str,
    batch: int,
    sides: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Print one row with each backend's time."""
    times = measure.per_call(sides, rounds, seconds)
    medians = {b: measure.Spread.of(values).median for b, values in times.items()}
    cells = [f"{1e6 * value:.1f}" for value in medians.values()]
    best = list(medians).index(min(medians, key=lambda b: medians[b]))
    cells[best] = f"**{cells[best]}**"
    print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
