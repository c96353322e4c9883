"""A packed network against its float twin in PyTorch and ONNX Runtime.

The packed network runs in a jitted JAX function and through the engine's C API. Times
whole networks in turn in one process, on the same threads: bits and integers against
the same architecture in float32 or int8. The twin of both ResNets is the
ResNet-18 of He et al., whose BatchNorm the libraries fold into its convolutions.
"""

import argparse
import ctypes
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

OURS = "xnor_jax, packed"
C_API = "xnor_jax, C API"
PEERS = ("torch", "onnxruntime")


def main() -> None:
    args = parse()
    cores = measure.pin(args.threads)
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not args.nodes:
        measure.need("torch", "onnx", "onnxruntime")
        import torch

        torch.set_num_threads(args.threads)
    # Warnings of deprecated exporters, and of 1-D kernels that quantization skips.
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)

    print(
        f"{args.rounds} rounds of about {args.seconds} s a side, "
        f"threads: {args.threads} (cores: {', '.join(map(str, cores))})"
    )
    print(f"cpu: {measure.describe_cpu()}")
    print(f"versions: {measure.versions(*(() if args.nodes else PEERS))}")
    for name in args.network:
        binary = network(name, binary=True)
        twin = None if name in RESNETS else network(name, binary=False)
        for batch in args.batch or ([1] if name in RESNETS else [1, 128]):
            if args.nodes:
                nodes(name, binary, batch, args)
            else:
                compare(name, binary, twin, batch, args)
        print(f"\n{name}: {sizes(binary)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=measure.positive,
        help="images (default 1 and 128; ResNets: 1)",
    )
    measure.add_options(parser)
    parser.add_argument(
        "--skip", nargs="+", default=[], help="peers to leave out, such as compile"
    )
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="instead, the time of each stage of the packed network, run alone",
    )
    return parser.parse_args()


def network(name: str, *, binary: bool) -> Any:
    """A model with random kernels and BatchNorm averages over random images."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model = NETWORKS[name](binary=binary, rngs=nnx.Rngs(0))
    norms = [m for _, m in nnx.iter_graph(model) if isinstance(m, nnx.BatchNorm)]
    key = jax.random.key(0)
    for norm in norms:
        norm.momentum = 0.0  # the averages of the last batch
        if norm.scale is not None:
            scale, bias, key = jax.random.split(key, 3)
            norm.scale[...] = jax.random.uniform(scale, norm.scale.shape) + 0.5
            norm.bias[...] = jax.random.normal(bias, norm.bias.shape) / 10
    model.train()
    model(jnp.asarray(images(model, 32 if max(model.image_shape) < 100 else 2)))
    model.eval()
    return model


def lenet5(**options: Any) -> Any:
    from xnor_jax.models.lenet5 import LeNet5

    return LeNet5(**options)


def nin(**options: Any) -> Any:
    from xnor_jax.models.nin import NIN

    return NIN(**options)


def resnet18(**options: Any) -> Any:
    from xnor_jax.models.resnet18 import ResNet18

    return ResNet18(**options)


def birealnet18(**options: Any) -> Any:
    from xnor_jax.models.birealnet18 import BiRealNet18

    return BiRealNet18(**options)


RESNETS = {"XNOR-ResNet-18": resnet18, "Bi-Real-18": birealnet18}
NETWORKS = {"NIN": nin, "LeNet-5": lenet5, **RESNETS}


def images(model: Any, batch: int):
    """Draw normal random images `[batch, H, W, C]`, float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, *model.image_shape), np.float32)


def compare(
    name: str, binary: Any, twin: Any, batch: int, args: argparse.Namespace
) -> None:
    """Print a table of all sides' times at a batch size."""
    x = images(binary, batch)
    with tempfile.TemporaryDirectory() as folder:
        peers = peer_sides(twin, x, Path(folder), args)
        sides = {
            OURS: packed_side(binary, x),
            C_API: c_side(binary, x, Path(folder, "network"), args.threads),
            **peers,
        }
        times = measure.per_call(sides, args.rounds, args.seconds)
    print(f"\n{name}, batch {batch}")
    floats = [name for name in peers if "int8" not in name]
    measure.print_comparison(times, OURS, floats)
    measure.print_best(times, C_API, floats)


def packed_side(binary: Any, x: Any) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    import xnor_jax as xnor

    packed = xnor.pack(binary)
    predict = jax.jit(lambda x: packed(x))
    given = jnp.asarray(x)
    expected, logits = binary(given), predict(given)
    error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
    if error > 1e-4:
        sys.exit(f"{OURS}: differs from the library's binary model by {error:.1e}")

    def run() -> object:
        return jax.block_until_ready(predict(given))

    return run


def c_side(binary: Any, x: Any, file: Path, threads: int) -> Callable[[], object]:
    """The engine without JAX, called through `ctypes`; see `engine/xnor.h`."""
    import numpy as np

    import xnor_jax as xnor
    from xnor_jax import _compiled

    library = _compiled.load()
    if library is None:
        sys.exit(f"{C_API}: the compiled library was not built")
    library.xnor_error.restype = ctypes.c_char_p
    packed = xnor.pack(binary)
    xnor.save(file, packed)
    model, expected = ctypes.c_void_p(), np.asarray(packed(x))
    logits = np.empty_like(expected)
    given, taken = (ctypes.c_void_p(array.ctypes.data) for array in (x, logits))
    count = ctypes.c_size_t(len(x))
    if library.xnor_load(str(file).encode(), ctypes.byref(model)) != 0:
        sys.exit(f"{C_API}: {library.xnor_error().decode()}")

    def run() -> object:
        if library.xnor_run(model, given, count, taken, threads) != 0:
            sys.exit(f"{C_API}: {library.xnor_error().decode()}")
        return logits

    if not np.array_equal(run(), expected):
        sys.exit(f"{C_API}: differs from the packed network in JAX")
    return run


def peer_sides(
    twin: Any, x: Any, folder: Path, args: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """The float twin in PyTorch and ONNX Runtime, checked against the library's.

    Without a twin, it is `peers.resnet18`, and the sides are checked against PyTorch.
    """
    import numpy as np
    import peers

    def make_net() -> Any:
        return peers.resnet18() if twin is None else peers.twin(twin)

    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    floats, int8 = folder / "float.onnx", folder / "int8.onnx"
    peers.export(make_net(), first, floats)
    peers.quantize(floats, int8, first)
    makers = {
        "torch eager": lambda: peers.eager(make_net(), first, last=False),
        "torch eager, channels last": lambda: peers.eager(make_net(), first, last=True),
        "torch.compile": lambda: peers.compiled(make_net(), first),
        "ONNX Runtime": lambda: peers.session(floats, first, args.threads),
        "ONNX Runtime, int8": lambda: peers.session(int8, first, args.threads),
    }
    sides = {}
    expected = (
        peers.eager(make_net(), first, last=False)()
        if twin is None
        else np.asarray(twin(x))
    )
    for name, make in makers.items():
        if any(word in name for word in args.skip):
            continue
        try:
            side = make()
        except Exception as error:  # such as no compiler for torch.compile
            print(f"{name} left out: {str(error).splitlines()[0]}")
            continue
        error = np.abs(side() - expected).max() / np.abs(expected).max()
        if error > (0.3 if "int8" in name else 1e-3):
            sys.exit(f"{name}: differs from the float model by {error:.1e}")
        sides[name] = side
    return sides


def nodes(name: str, binary: Any, batch: int, args: argparse.Namespace) -> None:
    """Print the time of each node of the packed network, compiled alone."""
    import jax
    import jax.numpy as jnp

    import xnor_jax as xnor

    packed = xnor.pack(binary)
    first = jnp.asarray(images(binary, batch))
    values: list[Any] = [first]
    sides = {"whole network": packed_side(binary, first)}
    labels = {"whole network": ""}
    for index, node in enumerate(packed.nodes):
        run = jax.jit(lambda args, node=node: node(args, packed.backend))
        label = f"{index} {node.name or '-'} ({type(node).__name__})"
        args_ = [values[i] for i in node.inputs]

        def side(run=run, args_=args_) -> object:
            return jax.block_until_ready(run(args_))

        sides[label] = side
        values.append(run(args_))
        shapes = ", ".join(map(shape_of, args_))
        labels[label] = f"{shapes} → {shape_of(values[-1])}"
    nothing = jax.jit(lambda x: x + 1)
    one = jnp.zeros(1)
    sides["a call of nothing"] = lambda: jax.block_until_ready(nothing(one))
    labels["a call of nothing"] = ""
    times = measure.per_call(sides, args.rounds, args.seconds)
    print(f"\n{name}, batch {batch}, node by node, each compiled and called alone")
    print("| node | in → out | µs a call: median | min | max |")
    print("|---|---|---|---|---|")
    for label, values in times.items():
        spread = [f"{1e6 * value:.1f}" for value in measure.Spread.of(values)]
        print(f"| {label} | {labels[label]} | {' | '.join(spread)} |", flush=True)


def shape_of(value: Any) -> str:
    kind = "bits" if hasattr(value, "words") else str(value.dtype)
    return f"{kind} {'×'.join(map(str, value.shape[1:]))}"


def sizes(binary: Any) -> str:
    """The file's size, compared with the parameters in float32."""
    import jax
    from flax import nnx

    import xnor_jax as xnor

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xnor"
        xnor.save(path, xnor.pack(binary))
        small = os.path.getsize(path)
    state = nnx.state(binary, nnx.Any(nnx.Param, nnx.BatchStat))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(binary, nnx.Param)))
    everything = sum(x.size for x in jax.tree.leaves(state))
    return (
        f"file {small} bytes; parameters in float32 {4 * parameters} bytes, "
        f"1/{4 * parameters / small:.2f}; with BatchNorm's averages "
        f"{4 * everything} bytes, 1/{4 * everything / small:.2f}"
    )


if __name__ == "__main__":
    main()
