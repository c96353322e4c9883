"""A model of how training scales to many devices. Prints SCALING.md's tables.

Only NIN's step on a CPU is measured; SCALING.md derives the formulas.
"""

from math import log2, prod
from typing import NamedTuple

US, MS = 1e-6, 1e-3
PASSES = 12  # over all activations, forward and backward
FLOOR = 0.4 * MS  # the least time to launch a step's kernels
DEVICES = (1, 8, 64, 1024)
CPU_STEP = 1.0  # seconds, NIN at batch 128 on two cores; measured, see README.md


class Conv(NamedTuple):
    """A product: the output's size, the window, and the channels in and out."""

    out: int
    window: int
    before: int
    after: int

    @property
    def macs(self) -> int:
        return prod((self.out, self.out, self.window, self.window, *self[2:]))


class Network(NamedTuple):
    """The products of a training step, and the sizes of what devices exchange."""

    name: str
    parameters: int
    products: tuple[Conv, ...]  # in order; the first one's input is the image
    norms: tuple[int, ...]  # the channels of each BatchNorm
    batch: int  # per device, in weak scaling

    @property
    def flops(self) -> int:
        """FLOPs per image: forward and both gradients, but not the image's gradient."""
        first, *others = (2 * product.macs for product in self.products)
        return 2 * first + 3 * sum(others)

    @property
    def traffic(self) -> int:
        """Memory traffic of an image's activations, in bytes of float32."""
        elements = sum(product.out**2 * product.after for product in self.products)
        return 4 * PASSES * elements

    @property
    def gradient(self) -> int:
        return 4 * self.parameters


def nin() -> Network:
    products = (
        Conv(32, 5, 3, 192),
        Conv(32, 1, 192, 160),
        Conv(32, 1, 160, 96),
        Conv(16, 5, 96, 192),
        Conv(16, 1, 192, 192),
        Conv(16, 1, 192, 192),
        Conv(8, 3, 192, 192),
        Conv(8, 1, 192, 192),
        Conv(8, 1, 192, 10),
    )
    norms = (192, 192, 160, 96, 192, 192, 192, 192, 192)
    return Network("NIN", 969_418, products, norms, 128)


def resnet18() -> Network:
    products, norms, before = [Conv(112, 7, 3, 64)], [64], 64
    for out, after in ((56, 64), (28, 128), (14, 256), (7, 512)):
        products += [Conv(out, 3, before, after), *[Conv(out, 3, after, after)] * 3]
        norms += [before, *[after] * 3]
        if after != before:
            products.append(Conv(out, 1, before, after))
            norms.append(after)
        before = after
    products.append(Conv(1, 1, 512, 1000))
    return Network("XNOR-ResNet-18", 11_688_616, tuple(products), tuple(norms), 128)


class Machine(NamedTuple):
    """Devices in groups, with fast links within a group and slower ones between."""

    name: str
    flops: float  # peak FLOP/s in bfloat16
    share: float  # the part of the peak that products reach
    memory: float  # bytes/s
    group: int
    inner: float  # bytes/s of a device within its group, one direction
    outer: float  # bytes/s of a device between groups, one direction
    launch: float  # seconds per message
    near: float  # seconds per hop within a group
    far: float  # seconds per hop between groups

    def compute(self, network: Network, batch: float) -> float:
        """Seconds of a step without messages: the slower of products and memory."""
        products = network.flops * batch / (self.share * self.flops)
        return max(FLOOR, products, network.traffic * batch / self.memory)

    def small(self, devices: int) -> float:
        """Seconds of an all-reduce of a few numbers: up a tree and down."""
        if devices == 1:
            return 0
        inside = min(devices, self.group)
        hops = self.near * log2(inside) + self.far * log2(devices / inside)
        return self.launch + 2 * hops

    def large(self, devices: int, size: float) -> float:
        """Seconds of a ring all-reduce: scatter in a group, across groups, gather."""
        if devices == 1:
            return 0
        inside = min(devices, self.group)
        groups = devices / inside
        within = 2 * (1 - 1 / inside) * size / self.inner
        across = 2 * (1 - 1 / groups) * size / inside / self.outer
        return within + across + self.small(devices)


H100 = Machine(
    "H100, 8 a node",
    flops=989e12,
    share=0.3,
    memory=3.35e12,
    group=8,
    inner=450e9,
    outer=50e9,
    launch=10 * US,
    near=1 * US,
    far=5 * US,
)
V5E = Machine(
    "TPU v5e, 256 a pod",
    flops=197e12,
    share=0.4,
    memory=819e9,
    group=256,
    inner=90e9,
    outer=3.1e9,
    launch=2 * US,
    near=2 * US,
    far=20 * US,
)


ETHERNET = Machine(
    "two CPU cores, 10 Gbit/s Ethernet",
    flops=1e11,
    share=1,
    memory=1e10,
    group=1,
    inner=1.25e9,
    outer=1.25e9,
    launch=20 * US,
    near=0,
    far=50 * US,
)


class Step(NamedTuple):
    """The seconds of each part of a step."""

    compute: float
    norms: float
    gradient: float

    @property
    def alone(self) -> float:
        """Seconds if nothing overlaps."""
        return sum(self)

    @property
    def overlapped(self) -> float:
        """Seconds if gradients are sent in the backward pass, 2/3 of the computing."""
        return self.compute + self.norms + max(0, self.gradient - self.compute * 2 / 3)


def step(
    machine: Machine,
    network: Network,
    devices: int,
    batch: float,
    *,
    computing: float | None = None,
    norm_group: int = 1024,
    gradient_bytes: float = 4,
) -> Step:
    """The parts of a data-parallel step.

    Args:
      machine: The machine.
      network: The network that is trained.
      devices: The number of devices.
      batch: The images per device.
      computing: The seconds of computing, if measured.
      norm_group: The number of devices that share BatchNorm's statistics.
      gradient_bytes: The bytes of one parameter's gradient.
    """
    # Forward (mean, mean of squares) and backward (two more sums), one after another.
    messages = 2 * len(network.norms)
    return Step(
        computing or machine.compute(network, batch),
        messages * machine.small(min(devices, norm_group)),
        machine.large(devices, gradient_bytes * network.parameters),
    )


def weak(
    machine: Machine, network: Network, computing: float | None = None
) -> list[str]:
    rows = [
        "| devices | images a step | computing, ms | BatchNorm, ms | gradients, ms | "
        "images/s | of linear | overlapped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one = step(machine, network, 1, network.batch, computing=computing).alone
    for devices in DEVICES:
        parts = step(machine, network, devices, network.batch, computing=computing)
        images = devices * network.batch
        cells = [
            f"{devices:,}",
            f"{images:,}",
            *(f"{part / MS:.2f}" for part in parts),
            rate(images / parts.alone),
            f"{one / parts.alone:.0%}",
            f"{one / parts.overlapped:.0%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def strong(machine: Machine, network: Network, images: int) -> list[str]:
    rows = [
        "| devices | images a device | step, ms | images/s | times one device |",
        "|---|---|---|---|---|",
    ]
    one = step(machine, network, 1, images).alone
    for devices in DEVICES:
        took = step(machine, network, devices, images / devices).alone
        cells = [
            f"{devices:,}",
            f"{images // devices:,}",
            f"{took / MS:.2f}",
            rate(images / took),
            f"{one / took:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def rate(images: float) -> str:
    """Format images per second with three significant digits."""
    return f"{float(f'{images:.3g}'):,.0f}"


def remedies(machine: Machine, network: Network, devices: int) -> list[str]:
    rows = [
        "| what is done | step, ms | of linear |",
        "|---|---|---|",
    ]
    one = step(machine, network, 1, network.batch).alone
    ways = {
        "nothing": {},
        "gradients in bfloat16": {"gradient_bytes": 2},
        "BatchNorm in groups of 8": {"norm_group": 8},
        "BatchNorm of each device alone": {"norm_group": 1},
        "BatchNorm in groups of 8, gradients overlapped": {"norm_group": 8},
    }
    for name, options in ways.items():
        parts = step(machine, network, devices, network.batch, **options)
        took = parts.overlapped if "overlapped" in name else parts.alone
        rows.append(f"| {name} | {took / MS:.2f} | {one / took:.0%} |")
    return rows


def main() -> None:
    for network in (nin(), resnet18()):
        print(
            f"\n{network.name}: {network.parameters:,} parameters, "
            f"{network.gradient:,} bytes of gradients; an image takes "
            f"{sum(product.macs for product in network.products) / 1e6:,.1f} million "
            f"multiplications forward, {network.flops / 1e9:.2f} GFLOP a step, "
            f"{network.traffic / 1e6:.1f} MB through memory; {len(network.norms)} "
            f"BatchNorms of {sum(network.norms):,} channels"
        )
        for machine in (H100, V5E):
            print(f"\n{network.name}, {machine.name}, {network.batch} images a device")
            print("\n".join(weak(machine, network)))
            print(f"\n{network.name}, {machine.name}, 1,024 images in all")
            print("\n".join(strong(machine, network, 1024)))
        print(
            f"\n{network.name}, {H100.name}, 1,024 devices, {network.batch} images each"
        )
        print("\n".join(remedies(H100, network, 1024)))
    print(f"\nNIN, {ETHERNET.name}, 128 images a device, {CPU_STEP} s measured")
    print("\n".join(weak(ETHERNET, nin(), CPU_STEP)))


if __name__ == "__main__":
    main()
