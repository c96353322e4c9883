"""One run in several processes, on one host or on many, through `jax.distributed`.

Every process runs the same program on its own devices and computes its part of each
batch. Only the first one prints and writes the small files; all of them write and read
checkpoints.
"""

import contextlib
import ipaddress
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from xnor_jax._words import first_line
from xnor_jax.train.cluster import Cluster, OptionError
from xnor_jax.train.folder import RunError

# A process counts as dead after this time without a heartbeat. JAX's default of 100 s
# is a long wait; a much shorter time would mistake a slow host for a dead one.
HEARTBEAT_SECONDS = 20


@contextlib.contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Join the cluster within the context; all processes leave it together.

    Enter it before anything that starts JAX's backend. It does nothing if the options
    name no cluster.

    Raises:
      OptionError: If JAX is asked to find the cluster, and finds none.
      RunError: If the other processes cannot be joined, or one of them is lost.
    """
    if not cluster.named:
        yield
        return
    _join(cluster)
    try:
        yield
        multihost_utils.sync_global_devices("the run is done")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RunError(_lost(cluster, first_line(error))) from error


def is_first() -> bool:
    """Whether this process prints and writes files: the first one, or the only one."""
    return jax.process_index() == 0


def open_together(folder: Path, open_first: Callable[[], None]) -> None:
    """Open the run's folder in the first process, then check that all processes see it.

    Args:
      folder: The run's folder.
      open_first: Opens the folder; called in the first process only.

    Raises:
      RunError: If `open_first` raises it, or a process does not see the folder. If one
        process raises, all do.
    """
    if jax.process_count() == 1:
        open_first()
        return
    for turn in (True, False):
        error = None
        try:
            if is_first() and turn:
                open_first()
            elif not turn and not (folder / "recipe.json").exists():
                raise RunError(
                    f"process {jax.process_index()} does not see what process 0 wrote "
                    f"in {folder}; give all processes one shared folder with --output"
                )
        except RunError as failure:
            error = failure
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise RunError(
                f"process {np.argmax(failed)} cannot use {folder}; see its output"
            )


def broadcast(number: int) -> int:
    """Return the first process's number in all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_equal(**parts: object) -> None:
    """Check that values are the same in all processes.

    Args:
      **parts: The values by name; their `repr` is compared.

    Raises:
      RunError: If a process has another value.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(repr(part).encode()) for part in parts.values()])
    found = multihost_utils.process_allgather(digests.astype(np.uint32))
    for name, column in zip(parts, found.T, strict=True):
        if (column != column[0]).any():
            raise RunError(
                f"process {np.argmax(column != column[0])} has a different "
                f"{name.replace('_', ' ')} from process 0; start all processes with "
                "the same arguments, data and folder"
            )


def _join(cluster: Cluster) -> None:
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            cluster_detection_method=None if cluster.cluster else "deactivate",
            initialization_timeout=cluster.start_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            # A process that leaves alone has failed, which the others should see soon.
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        if "should be defined" not in str(error) and "must be defined" not in str(
            error
        ):
            raise
        raise OptionError(
            "--cluster: JAX detects no cluster here (it supports Slurm, Open MPI, "
            "Kubernetes and Cloud TPU); give --coordinator, --process-id and "
            "--num-processes"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"cannot connect to the other processes: {first_line(error)}"
        ) from error


def _lost(cluster: Cluster, reason: str) -> str:
    """The message for processes that cannot reach each other, or no longer can."""
    line = f"connection between processes lost ({reason}); "
    coordinator = (cluster.coordinator or "").rpartition(":")[0]
    # A process gives the others the address that its host's name resolves to.
    if not _is_loopback(coordinator) and _is_loopback(name := socket.gethostname()):
        line += (
            f"if they run on several hosts, map {name} to its network address, "
            "not a loopback address, in /etc/hosts; "
        )
    return line + "restart all processes with --resume"


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
