"""The paper's layer, 256 → 256 channels, 3×3, on 14×14: bits against floats.

All sides take signs in float32 and return float32: ours includes packing the signs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

OURS = "xnor_jax, packed"
SIZE, CHANNELS, WINDOW = 14, 256, 3


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads)
    measure.need("torch", "onnx", "onnxruntime")
    import jax
    import torch

    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(args.threads)
    print(
        f"{CHANNELS} → {CHANNELS} channels, {WINDOW}×{WINDOW}, {SIZE}×{SIZE}, "
        f"{args.rounds} rounds of about {args.seconds} s a side, threads: "
        f"{args.threads} (cores: {', '.join(map(str, cores))})"
    )
    print(f"cpu: {measure.describe_cpu()}")
    print(f"versions: {measure.versions('torch', 'onnxruntime')}")
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as folder:
            sides = all_sides(batch, Path(folder), args.threads)
            times = measure.per_call(sides, args.rounds, args.seconds)
        print(f"\nbatch {batch}")
        measure.print_comparison(times, OURS, times)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--batch", nargs="+", type=measure.positive, default=[1, 16], help="images"
    )
    measure.add_options(parser)
    return parser.parse_args()


def all_sides(batch: int, folder: Path, threads: int) -> dict[str, Callable[[], Any]]:
    """All sides, after a check that their results agree."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.choice(np.float32([-1, 1]), (batch, SIZE, SIZE, CHANNELS))
    kernel = rng.choice(np.float32([-1, 1]), (WINDOW, WINDOW, CHANNELS, CHANNELS))
    scale = rng.uniform(0.01, 0.1, CHANNELS).astype(np.float32)
    sides = {
        **jax_sides(x, kernel, scale),
        **torch_sides(x, kernel * scale, folder, threads),
    }
    expected = np.asarray(sides[OURS]())
    for name, side in sides.items():
        y = np.asarray(side())
        y = y if y.shape == expected.shape else y.transpose(0, 2, 3, 1)
        error = np.abs(y - expected).max() / np.abs(expected).max()
        if error > 1e-4:
            sys.exit(f"{name}: differs from the packed layer by {error:.1e}")
    return sides


def jax_sides(x: Any, kernel: Any, scale: Any) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp
    from jax import lax

    from xnor_jax import convolution, ops
    from xnor_jax.geometry import conv_geometry

    bits = ops.pack_kernel(kernel)
    epilogue = ops.Affine(jnp.asarray(scale), jnp.zeros(CHANNELS))
    geometry = conv_geometry(
        "conv", (SIZE, SIZE), (WINDOW, WINDOW), strides=1, padding=1
    )

    def packed(x):
        return ops.packed_conv(ops.sign_bits(x), bits, epilogue, strides=1, padding=1)

    def xla(order):
        def product(x):
            weights = jnp.asarray(kernel * scale)
            return lax.conv_general_dilated(
                x,
                weights,
                geometry.strides,
                geometry.padding,
                dimension_numbers=(order, "HWIO", order),
            )

        return product

    def patches(x):
        x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
        weights = jnp.asarray(kernel * scale)
        return convolution._patch_conv(geometry, None, x, weights)

    def caller(function, x):
        run, given = jax.jit(function), jnp.asarray(x)
        return lambda: jax.block_until_ready(run(given))

    return {
        OURS: caller(packed, x),
        "XLA convolution, channels last": caller(xla("NHWC"), x),
        "XLA convolution, channels first": caller(xla("NCHW"), x.transpose(0, 3, 1, 2)),
        "XLA, patch product": caller(patches, x),
    }


def torch_sides(
    x: Any, kernel: Any, folder: Path, threads: int
) -> dict[str, Callable[[], Any]]:
    import numpy as np
    import peers
    import torch

    def layer():
        conv = torch.nn.Conv2d(CHANNELS, CHANNELS, WINDOW, padding=1, bias=False)
        conv.weight = torch.nn.Parameter(
            torch.tensor(kernel.transpose(3, 2, 0, 1)), requires_grad=False
        )
        return conv.eval()

    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    path = folder / "layer.onnx"
    peers.export(layer(), first, path)
    return {
        "torch eager": peers.eager(layer(), first, last=False),
        "torch eager, channels last": peers.eager(layer(), first, last=True),
        "ONNX Runtime": peers.session(path, first, threads),
    }


if __name__ == "__main__":
    main()
