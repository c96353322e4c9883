"""The programs that XLA compiles for an H100, without a GPU.

They show which library computes each product and with which operands, how much memory a
training step takes, and whether the kernel of `ops` compiles. Only times need a GPU.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import gpu_packed
import gpu_step
import measure
import train_step

# An H100 with 80 GB as XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CALLS = {"__cudnn": "cuDNN", "__cublas": "cuBLAS", "__gpu": "ours, Triton"}


class Product(NamedTuple):
    """A product in a compiled program."""

    backward: bool
    by: str
    operands: str
    result: str
    layer: str


def main() -> None:
    args = parse()
    # Autotuning would run kernels on the GPU, which is absent.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    import jax

    jax.config.update("jax_platforms", "cpu")
    device = h100()
    print(f"compiled for: {device.device_set}; {measure.versions()}")
    # Pallas queries the device's kind before there is a device.
    with jax.sharding.use_abstract_mesh(device.mesh.abstract_mesh):
        for case in gpu_step.TINY if args.tiny else gpu_step.CASES:
            for dtype in gpu_step.OURS.values():
                training(case, dtype, device)
        layers(2 if args.tiny else 128, device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test")
    return parser.parse_args()


def h100() -> Any:
    """The sharding of arrays on an H100."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    except Exception as error:
        sys.exit(f"gpu_compile needs JAX's plugin, pip install 'jax[cuda12]': {error}")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return NamedSharding(mesh, PartitionSpec())


def training(case: gpu_step.Case, dtype: str, device: Any) -> None:
    """Print the products of a training step and the memory that it takes."""
    import jax
    import jax.numpy as jnp

    from xnor_jax.train import step

    recipe = gpu_step.recipe(case, dtype)
    trainer, state = train_step.create(recipe, case.image_shape, case.classes)
    x = jax.ShapeDtypeStruct((case.batch, *case.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    args = placed((state, step.zero_total(state), x, labels), device)
    compiled = step.make_train_batch(trainer).lower(*args).compile()
    print(f"\n{case}, {dtype}: {megabytes(compiled):,.0f} MB beside the state")
    print("| pass | by | operands | result | products | layers |")
    print("|---|---|---|---|---|---|")
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for *kind, layer in products(compiled.as_text()):
        kinds.setdefault(tuple(kind), []).append(layer)
    for (backward, *kind), names in sorted(kinds.items()):
        cells = "backward" if backward else "forward", *kind, str(len(names))
        where = ", ".join(sorted({*names} - {""}))
        print(f"| {' | '.join(cells)} | {where} |", flush=True)


def layers(batch: int, device: Any) -> None:
    """Print how each backend of `ops` computes a layer, from float images to sums."""
    import jax
    import jax.numpy as jnp

    from xnor_jax import ops

    print(f"\nbinary layers, batch {batch}, float images in, sums out")
    print("| layer | backend | by | operands | MB beside both |")
    print("|---|---|---|---|---|")
    for name, (image, kernel) in gpu_packed.LAYERS.items():
        for backend in ("xla", "gpu", "pallas"):
            run = partial(ops.binary_conv, strides=1, padding="SAME", backend=backend)
            shapes = [
                jax.ShapeDtypeStruct(shape, jnp.float32)
                for shape in ((batch, *image), kernel)
            ]
            compiled = jax.jit(run).lower(*placed(shapes, device)).compile()
            found = [*products(compiled.as_text())]
            cells = found[0][1:3] if found else ("XLA's loops", "u32 words")
            memory = f"{megabytes(compiled):.1f}"
            print(f"| {name} | {backend} | {' | '.join(cells)} | {memory} |")


def placed(tree: Any, device: Any) -> Any:
    """The shapes of a tree of arrays, on the device."""
    import jax

    def place(array: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device)

    return jax.tree.map(place, tree)


def megabytes(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def products(text: str) -> Iterator[Product]:
    """The products of a compiled program, from its text."""
    types = dict(re.findall(r"%?([\w.\-]+)(?: =|:) \(?(\w+)\[", text))
    for line in text.splitlines():
        found = re.search(r" = \(?(\w+)\[.*? (custom-call|dot)\((.*?)\)", line)
        name = re.search(r'op_name="([^"]*)"', line)
        if not (found and name):
            continue
        result, by, operands = found.groups()
        target = re.search(r'custom_call_target="(\w+)', line)
        if by == "custom-call" and not (target and target[1] in CALLS):
            continue
        both = [types[operand.lstrip("%")] for operand in operands.split(", ")[:2]]
        layer = re.search(r"jvp\((\w+)\)", name[1])
        yield Product(
            "transpose(jvp" in name[1],
            CALLS[target[1]] if target else "XLA's own, Triton",
            " · ".join(both),
            result,
            layer[1] if layer else "",
        )


if __name__ == "__main__":
    main()
