"""The noise of an evaluation: python noise.py RUN DATA_DIR

Re-estimates BatchNorm's statistics of a run's newest checkpoint several times, each
time from other training images, and prints the test accuracy with each.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from xnor_jax.train import loop, step
from xnor_jax.train.folder import RunError, read_info
from xnor_jax.train.recipe import load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("data_dir", type=Path, nargs="?", help="its data set's folder")
    parser.add_argument("--batches", type=int, default=20, help="of training images")
    parser.add_argument("--times", type=int, default=6, help="at least 2")
    args = parser.parse_args()
    try:
        info = read_info(args.run)
        trainer, state, _ = loop.restore(args.run, info)
    except RunError as error:
        sys.exit(f"noise: {error}")
    most = info.train_images // info.recipe.batch_size
    if not 1 <= args.batches <= most or args.times < 2:
        sys.exit(f"noise: expected 1 to {most} batches, and at least 2 times")
    data = load_data(info.recipe, args.data_dir)
    train, test = jax.tree.map(jnp.asarray, (data.train, data.test))
    evaluate = step.make_evaluate(trainer)

    def accuracy(rest) -> float:
        return 100 * float(evaluate(state._replace(rest=rest), *test).accuracy)

    print(f"statistics of the run: {accuracy(state.rest):.2f} %")
    recipe = dataclasses.replace(trainer.recipe, calibration_batches=args.batches)
    calibrate = step.make_calibrate(trainer._replace(recipe=recipe))
    found = []
    for seed in range(args.times):
        rest = calibrate(state, train.images, jax.random.key(seed))
        found.append(accuracy(rest))
        print(f"from {args.batches} batches: {found[-1]:.2f} %", flush=True)
    print(f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f} %")


if __name__ == "__main__":
    main()
