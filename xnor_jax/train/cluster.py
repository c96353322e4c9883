"""The options that identify this process in a cluster."""

import dataclasses


class OptionError(ValueError):
    """Options that do not identify this process in a cluster."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One run in several processes: start the same command once on each host."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens and the others connect; requires
    --process-id and --num-processes."""
    process_id: int | None = None
    """The index of this process, from 0."""
    num_processes: int | None = None
    """The number of processes."""
    cluster: bool = False
    """Let JAX detect these three, under Slurm, Open MPI, Kubernetes or Cloud TPU."""
    start_timeout: int = 120
    """Seconds to wait for the other processes at the start."""

    @property
    def named(self) -> bool:
        """Whether the options name a cluster."""
        return self.cluster or self.coordinator is not None


def validate(cluster: Cluster) -> Cluster:
    """Check the options, and return them.

    Raises:
      OptionError: If they are inconsistent, incomplete or out of range.
    """
    coordinator, this = cluster.coordinator, cluster.process_id
    count = cluster.num_processes
    by_hand = {
        "--coordinator": coordinator,
        "--process-id": this,
        "--num-processes": count,
    }
    given = [name for name, value in by_hand.items() if value is not None]
    missing = [name for name in by_hand if name not in given]
    if cluster.cluster and given:
        raise OptionError(f"--cluster: it detects {given[0]}; omit one of the two")
    if given and missing:
        raise OptionError(f"{given[0]}: give {' and '.join(missing)} too")
    if coordinator is not None and this is not None and count is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise OptionError(
                f"--coordinator: expected HOST:PORT, such as 10.0.0.1:1234, got "
                f"{coordinator}"
            )
        if count < 1:
            raise OptionError(f"--num-processes: expected at least 1, got {count}")
        if not 0 <= this < count:
            raise OptionError(
                f"--process-id: expected 0 to {count - 1} (of {count} processes), got "
                f"{this}"
            )
    if cluster.start_timeout != Cluster.start_timeout and not cluster.named:
        raise OptionError(
            "--start-timeout: expected with --coordinator or --cluster only"
        )
    if cluster.start_timeout < 1:
        raise OptionError(
            f"--start-timeout: expected at least 1 second, got {cluster.start_timeout}"
        )
    return cluster
