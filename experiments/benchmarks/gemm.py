"""The product of packed words against the processor's limit, on one thread.

The limit is the measured speed of a loop of xor, popcount and add on registers, without
memory access, in the best of several groupings. On a 512-bit vector, these three
instructions are 512 multiplications and additions of signs.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

LOOP = "xor + popcount + add on registers"
# (accumulators, group): each instruction runs for a whole group before the next one.
GROUPINGS = ((8, 8), (12, 1), (12, 2), (12, 4), (12, 6), (12, 12), (16, 4), (16, 8))
VECTOR = 512  # signs
NEEDED = ("avx512f", "avx512_vpopcntdq")


def main() -> None:
    args = parse()
    missing = [flag for flag in NEEDED if flag not in measure.cpu_flags()]
    if missing:
        sys.exit(
            "gemm: expected a processor with AVX-512, found one without "
            f"{', '.join(missing)}"
        )
    cores = measure.pin(1)
    import jax

    jax.config.update("jax_platforms", "cpu")
    import xnor_jax
    from xnor_jax.ops import cpu

    if not cpu.is_available():
        sys.exit("gemm: the cpu backend was not built; install with a C++ compiler")
    print(
        f"M {args.rows}, N {args.columns}, {args.rounds} rounds of about "
        f"{args.seconds} s a side, one thread (core {cores[0]})"
    )
    print(f"cpu: {measure.describe_cpu()}")
    print(
        f"versions: xnor_jax {xnor_jax.__version__} ({cpu.instruction_set()}), "
        f"jax {jax.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = build(Path(folder))
        grouping, steps = pick(loop)
        print(f"loop: {LOOP}, best of {len(GROUPINGS)} groupings: {grouping}\n")
        print("| K | epilogue | signs·10¹²/s: median | min | max | of the loop |")
        print("|---|---|---|---|---|---|")
        for size in args.k:
            compare(size, args, lambda: loop(*grouping, steps), steps * grouping[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (
        ("rows", 1024, "rows of the first operand, M (default 1024)"),
        ("columns", 256, "columns of the second, N (default 256)"),
        ("rounds", 9, "rounds (default 9)"),
    ):
        parser.add_argument(
            f"--{name}", type=measure.positive, default=default, help=text
        )
    parser.add_argument(
        "--k",
        nargs="+",
        type=measure.positive,
        default=[1152, 2304, 4608],
        help="signs in a row (default 1152 2304 4608)",
    )
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="a side's turn (default 0.1)"
    )
    return parser.parse_args()


def compare(
    size: int, args: argparse.Namespace, loop: Callable[[], None], vectors: int
) -> None:
    """Print a row for each epilogue: sums as int32, and thresholds to bits."""
    sides = {"loop": loop, **products(args.rows, size, args.columns)}
    work = dict.fromkeys(sides, args.rows * args.columns * size)
    work["loop"] = vectors * VECTOR
    times = measure.per_call(sides, args.rounds, args.seconds)
    speeds = {name: [work[name] / t for t in values] for name, values in times.items()}
    for name, values in speeds.items():
        spread = " | ".join(f"{v / 1e12:.3f}" for v in measure.Spread.of(values))
        part = measure.ratios(values, speeds["loop"])  # of speeds, hence inverted
        share = measure.Spread(1 / part.median, 1 / part.most, 1 / part.least)
        percent = [f"{100 * value:.1f} %" for value in share]
        print(
            f"| {size} | {name} | {spread} | {percent[0]} "
            f"({percent[1]} to {percent[2]}) |",
            flush=True,
        )


def products(rows: int, size: int, columns: int) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from xnor_jax import ops

    keys = jax.random.split(jax.random.key(0))
    x = ops.sign_bits(jax.random.normal(keys[0], (rows, size)))
    kernel = ops.pack_kernel(jax.random.normal(keys[1], (size, columns)))
    flip = jnp.zeros(-(-columns // 32), jnp.uint32)
    epilogues = {
        "sums": ops.Sums(),
        "threshold": ops.Threshold(jnp.zeros(columns, jnp.int32), flip),
    }

    def product(epilogue):
        run = jax.jit(
            lambda x, kernel, epilogue: ops.packed_matmul(
                x, kernel, epilogue, backend="cpu"
            )
        )
        operands = jax.block_until_ready((x, kernel, epilogue))
        return lambda: jax.block_until_ready(run(*operands))

    return {name: product(epilogue) for name, epilogue in epilogues.items()}


def pick(loop: Callable[[int, int, int], None]) -> tuple[tuple[int, int], int]:
    """The fastest grouping, and the number of its loop's steps in about 1 ms."""
    from time import perf_counter

    best = {}
    steps = 100_000
    for grouping in GROUPINGS * 3:
        start = perf_counter()
        loop(*grouping, steps)
        speed = steps * grouping[0] / (perf_counter() - start)
        best[grouping] = max(speed, best.get(grouping, 0))
    grouping = max(best, key=lambda g: best[g])
    return grouping, max(1, int(1e-3 * best[grouping] / grouping[0]))


def build(folder: Path) -> Callable[[int, int, int], None]:
    """Compile the loops to a function of the accumulators, the group and the steps."""
    source, library = folder / "loops.cc", folder / "loops.so"
    source.write_text("\n".join(function(*grouping) for grouping in GROUPINGS))
    flags = ["-O2", "-mavx512f", "-mavx512vpopcntdq", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    loops = ctypes.CDLL(str(library))

    def run(accumulators: int, group: int, steps: int) -> None:
        loops[f"loop_{accumulators}_{group}"](ctypes.c_long(steps))

    return run


def function(accumulators: int, group: int) -> str:
    """A C function in assembly: a compiler would hoist the xor out of the loop."""
    first = 2 + accumulators  # after two operands and the accumulators
    lines = ["1:"]
    for begin in range(0, accumulators, group):
        members = range(group)
        lines += [f"vpxord %%zmm0, %%zmm1, %%zmm{first + i}" for i in members]
        lines += [f"vpopcntd %%zmm{first + i}, %%zmm{first + i}" for i in members]
        lines += [
            f"vpaddd %%zmm{first + i}, %%zmm{2 + begin + i}, %%zmm{2 + begin + i}"
            for i in members
        ]
    lines += ["dec %0", "jnz 1b", "vzeroupper"]
    text = "".join(f'"{line}\\n"' for line in lines)
    clobbers = ", ".join(f'"xmm{i}"' for i in range(32))
    return (
        f'extern "C" void loop_{accumulators}_{group}(long n) '
        f'{{ asm volatile({text} : "+r"(n) : : {clobbers}, "cc"); }}'
    )


if __name__ == "__main__":
    main()
