"""The time of a training step by layer, from a profile of its program.

The program is the compiled epoch that `xnor-jax train` runs. The profile gives the time
of each operation, and the program's text gives the operation's layer.
"""

import argparse
import dataclasses
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import measure
from train_step import EPOCH_IMAGES

PRODUCTS = ("ffi_call", "dot_general", "conv_general_dilated")
# Calls into the C++ library without products: sums, and packing signs or flags.
PASSES = re.compile(r'"xnor_jax_channel_sums"|operations = dense<\[(2|5),')
OTHERS = "the batch; rule, Adam, projection"


def main() -> None:
    args = parse()
    measure.pin(args.threads)
    import jax

    jax.config.update("jax_platforms", "cpu")
    cpu = measure.describe_cpu()
    run, program = compiled_epoch(args.recipe, args.batch, args.steps)
    run()
    seconds = measure.in_turn({"step": run}, args.rounds)["step"]
    step = measure.Spread.of([1000 * value / args.steps for value in seconds])
    memory = program.memory_analysis()
    rows = account(profiled(run), scopes(program.as_text()), args.steps)

    print(f"{args.recipe}, batch {args.batch}, threads: {args.threads}; cpu: {cpu}")
    print(f"versions: {measure.versions('flax')}")
    print(
        f"{step.median:.1f} ms a step ({step.least:.1f} to {step.most:.1f}); "
        f"temporary memory {memory.temp_size_in_bytes / 1e6:.0f} MB\n"
    )
    print("| layer | forward, ms | of it products | backward, ms | of it products |")
    print("|---|---|---|---|---|")
    total = [0.0] * 4
    for name, times in rows.items():
        print(f"| {name} | {' | '.join(f'{time:.1f}' for time in times)} |")
        total = [a + b for a, b in zip(total, times, strict=True)]
    print(f"| all | {' | '.join(f'{time:.1f}' for time in total)} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", choices=EPOCH_IMAGES, default="cifar10-nin-reference"
    )
    for name, default, text in (
        ("steps", 4, "steps a round"),
        ("rounds", 5, "rounds"),
        ("threads", 2, "cores of the process"),
        ("batch", 128, "images a step"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(
            f"--{name}", type=measure.positive, default=default, help=text
        )
    return parser.parse_args()


def compiled_epoch(name: str, batch: int, steps: int):
    """A function that trains for `steps` steps on random images, and its program."""
    import jax
    import jax.numpy as jnp

    from xnor_jax.data import SOURCES
    from xnor_jax.train import recipe as recipes
    from xnor_jax.train import step

    recipe = dataclasses.replace(recipes.get(name), batch_size=batch)
    shape = (28, 28, 1) if recipe.dataset == "mnist" else (32, 32, 3)
    trainer, state = step.create(
        recipe,
        SOURCES[recipe.dataset],
        image_shape=shape,
        classes=10,
        steps_per_epoch=EPOCH_IMAGES[name] // batch,
    )
    key = jax.random.key(0)
    images = jax.random.randint(key, (steps * batch, *shape), 0, 256, jnp.uint8)
    labels = jax.random.randint(key, (steps * batch,), 0, 10, jnp.int32)
    batches = jax.random.permutation(key, steps * batch).reshape(steps, batch)
    args = 0, steps, images, labels, batches, key
    carry = state, step.zero_total(state)
    epoch = step.make_train_steps(trainer).lower(carry, *args).compile()

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(epoch(carry, *args))

    return run, epoch


def profiled(run) -> dict[str, float]:
    """The time of each of the program's operations in one call, in milliseconds."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).glob("**/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    times: dict[str, float] = defaultdict(float)
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if name := dict(event.stats).get("hlo_op"):
                    times[str(name)] += event.duration_ns / 1e6
    return times


def scopes(program: str) -> dict[str, str]:
    """The JAX name stack of each operation in a program's text."""
    named = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"')
    found = {}
    for line in program.splitlines():
        if operation := named.match(line):
            found[operation[1]] = operation[2] + "/pass" * bool(PASSES.search(line))
    return found


def account(
    times: dict[str, float], scopes: dict[str, str], steps: int
) -> dict[str, list[float]]:
    """Milliseconds per step by layer: forward, its products, backward, its products."""
    # jit(epoch)/while/body/closed_call/transpose(jvp(block2))/…/dot_general
    layer = re.compile(r"/(transpose\()?jvp\((?:transpose\(jvp\()?(\w+)\)")
    rows: dict[str, list[float]] = {}
    for operation, time in times.items():
        if operation.startswith(("while", "call", "conditional")):
            continue  # Its operations are counted individually.
        scope = scopes.get(operation, "")
        found = layer.search(scope)
        name = found[2] if found else OTHERS
        row = rows.setdefault(name, [0.0] * 4)
        at = 2 if found and found[1] else 0
        row[at] += time / steps
        if scope.endswith(PRODUCTS):
            row[at + 1] += time / steps
    return dict(sorted(rows.items(), key=lambda row: -row[1][0] - row[1][2]))


if __name__ == "__main__":
    main()
