"""A packed network against the same architecture in Larq Compute Engine (LCE).

Ours runs through the engine's C API. LCE needs TensorFlow, and so an environment of its
own. Its Python runs LCE's side in a second process; the calls of both processes are
timed in turn:

    python3.11 -m venv lce
    lce/bin/pip install larq larq-compute-engine==0.16.0 'tensorflow-cpu<2.17' \
      'tf-keras<2.17' 'numpy<2'
    python experiments/benchmarks/lce.py --python lce/bin/python

LCE's optimized kernels are for Arm; on x86 it runs its portable ones. Its networks are
padded with ones, which it runs faster than zeros. Their weights are random.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORKS = ("NIN", "LeNet-5", "XNOR-ResNet-18", "Bi-Real-18")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--serve", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--python", help="the Python that has LCE")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    if "--serve" in sys.argv:
        parser.add_argument("--threads", type=int)
        args = parser.parse_args()
        serve(args.serve, args.threads)
        return

    import measure

    measure.add_options(parser)
    args = parser.parse_args()
    if args.python is None:
        parser.error("--python: expected the Python of an environment with LCE")
    measure.pin(args.threads)
    import packed_networks

    print(f"cpu: {measure.describe_cpu()}")
    print(f"versions: {measure.versions()}, LCE 0.16.0; threads: {args.threads}")
    for name in args.network:
        model = packed_networks.network(name, binary=True)
        image = packed_networks.images(model, 1)
        command = [args.python, __file__, "--serve", name]
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                [*command, "--threads", str(args.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as process,
        ):
            file = Path(folder, "network")
            ours = packed_networks.c_side(model, image, file, args.threads)
            sides = {packed_networks.C_API: ours, "LCE": asker(process)}
            times = measure.per_call(sides, args.rounds, args.seconds)
            process.stdin.close()
        print(f"\n{name}, batch 1")
        for side, values in times.items():
            spread = measure.Spread.of(values)
            print(f"{side}: {1e3 * spread.median:.3f} ms", end="; ")
        print(
            "LCE / ours: {:.1f} ({:.1f} to {:.1f})".format(
                *measure.ratios(*times.values())
            )
        )


def asker(process: subprocess.Popen) -> Callable[[], object]:
    """A side that runs one call in the other process."""

    def run() -> object:
        process.stdin.write("run\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line != "done\n":
            sys.exit("LCE's process ended: run its command by hand to see why")
        return line

    return run


def serve(name: str, threads: int) -> None:
    """Run LCE's side: a call of the network for each line of standard input."""
    os.environ.update(TF_USE_LEGACY_KERAS="1", CUDA_VISIBLE_DEVICES="")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Other output would look like an answer.
    import larq_compute_engine as lce
    import numpy as np
    import tensorflow as tf
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    shape = {"NIN": (32, 32, 3), "LeNet-5": (28, 28, 1)}.get(name, (224, 224, 3))
    x = tf.keras.Input(shape)
    layers = Layers(tf)
    makers = {"NIN": layers.nin, "LeNet-5": layers.lenet5}
    y = makers[name](x) if name in makers else layers.resnet18(x, name == "Bi-Real-18")
    network = lce.convert_keras_model(tf.keras.Model(x, y))
    interpreter = Interpreter(network, num_threads=threads)
    image = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    for _ in sys.stdin:
        interpreter.predict(image)
        answers.write("done\n")
        answers.flush()


class Layers:
    """The networks in Keras and Larq."""

    def __init__(self, tf: Any):
        self.keras = tf.keras.layers
        self.relu, self.add = tf.nn.relu, tf.keras.layers.add

    def conv(self, x, features, size, strides=1, padding="same"):
        return self.keras.Conv2D(features, size, strides, padding, use_bias=False)(x)

    def binary(self, x, features, size, strides=1, padding="same"):
        import larq

        return larq.layers.QuantConv2D(
            features,
            size,
            strides,
            padding,
            pad_values=1.0,
            use_bias=False,
            input_quantizer="ste_sign",
            kernel_quantizer="ste_sign",
        )(x)

    def norm(self, x):
        return self.keras.BatchNormalization(
            gamma_initializer="random_normal", beta_initializer="random_normal"
        )(x)

    def block(self, x, *conv, relu=True, **options):
        """XNOR-Net's block: BatchNorm, sign, product, ReLU."""
        x = self.binary(self.norm(x), *conv, **options)
        return self.relu(x) if relu else x

    def nin(self, x):
        x = self.relu(self.norm(self.conv(x, 192, 5)))
        x = self.block(self.block(x, 160, 1), 96, 1)
        x = self.keras.MaxPool2D(3, 2, "same")(x)
        x = self.block(self.block(self.block(x, 192, 5), 192, 1), 192, 1)
        x = self.keras.AveragePooling2D(3, 2, "same")(x)
        x = self.block(self.block(x, 192, 3), 192, 1)
        x = self.relu(self.conv(self.norm(x), 10, 1))
        return self.keras.GlobalAveragePooling2D()(x)

    def lenet5(self, x):
        x = self.relu(self.norm(self.conv(x, 20, 5, padding="valid")))
        x = self.block(self.keras.MaxPool2D(2)(x), 50, 5, padding="valid")
        # A dense layer, written as the convolution that it is.
        x = self.block(self.keras.MaxPool2D(2)(x), 500, 4, padding="valid")
        return self.keras.Dense(10)(self.keras.Flatten()(x))

    def resnet18(self, x, bireal):
        x = self.norm(self.conv(x, 64, 7, 2))
        x = self.keras.MaxPool2D(3, 2, "same")(x if bireal else self.relu(x))
        for stage, features in enumerate((64, 128, 256, 512)):
            for index in range(4 if bireal else 2):
                strides = 2 if stage > 0 and index == 0 else 1
                x = (self.bireal if bireal else self.residual)(x, features, strides)
        x = self.keras.GlobalAveragePooling2D()(x)
        return self.keras.Dense(1000)(x)

    def residual(self, x, features, strides):
        y = self.block(x, features, 3, strides)
        y = self.block(y, features, 3, relu=False)
        if strides > 1:
            x = self.norm(self.conv(x, features, 1, strides))
        return self.relu(self.add([y, x]))

    def bireal(self, x, features, strides):
        y = self.norm(self.binary(x, features, 3, strides))
        if strides > 1:
            x = self.keras.AveragePooling2D(2)(x)
            x = self.norm(self.conv(x, features, 1))
        return self.add([y, x])


if __name__ == "__main__":
    main()
