"""One run in several processes, on one host or on many, through `jax.distributed`.

Every process runs the same program on its own devices and computes its part of each
batch. The first one alone writes the small files and speaks; checkpoints are written
and read by all.
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

from xnor_jax.train.cluster import Cluster, OptionError
from xnor_jax.train.folder import RunError

# A dead process is one that has not been heard of for so long. JAX's own 100 s make
# people wait; much less would take a host that is only slow for a dead one.
HEARTBEAT_SECONDS = 20


@contextlib.contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Be one of the cluster's processes; all of them leave together.

    It has to come before anything that starts JAX's backend. Where the options name no
    cluster it does nothing.

    Raises:
      OptionError: If JAX is asked to find the cluster, and finds none.
      RunError: If a computation over all processes fails: another one is lost.
    """
    if not cluster.named:
        yield
        return
    _join(cluster)
    try:
        yield
        multihost_utils.sync_global_devices("the run is done")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise RunError(_lost(cluster, reason)) from error


def is_first() -> bool:
    """Whether this is the process that writes and speaks, as a single one does."""
    return jax.process_index() == 0


def open_together(folder: Path, open_first: Callable[[], None]) -> None:
    """The first process opens the run's folder, then the others look for it.

    Args:
      folder: The run's folder.
      open_first: What the first process does.

    Raises:
      RunError: What the first raised, or that a process does not see the folder. All
        processes raise where one does.
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
                    f"in {folder}; give all processes a folder that they share with "
                    "--output"
                )
        except RunError as failure:
            error = failure
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise RunError(
                f"process {np.argmax(failed)} cannot use {folder}: see what it says"
            )


def agree(number: int) -> int:
    """The first process's number, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_alike(**parts: object) -> None:
    """Compare what has to be the same in all processes.

    Args:
      **parts: By name, values whose `repr` says all about them.

    Raises:
      RunError: If a process has another one.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(repr(part).encode()) for part in parts.values()])
    found = multihost_utils.process_allgather(digests.astype(np.uint32))
    for name, column in zip(parts, found.T, strict=True):
        if (column != column[0]).any():
            raise RunError(
                f"process {np.argmax(column != column[0])} has another "
                f"{name.replace('_', ' ')} than process 0; start all processes with "
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
            # Who leaves alone has failed: the others shall hear of it soon.
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        if "should be defined" not in str(error) and "must be defined" not in str(
            error
        ):
            raise
        raise OptionError(
            "--cluster: JAX finds none here (it knows Slurm, Open MPI, Kubernetes and "
            "Cloud TPU); give --coordinator, --process-id and --num-processes"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"cannot join the other processes: {str(error).splitlines()[0]}"
        ) from error


def _lost(cluster: Cluster, reason: str) -> str:
    """One line for processes that do not reach each other, or no longer do."""
    line = f"the processes lost each other ({reason}); "
    coordinator = (cluster.coordinator or "").rpartition(":")[0]
    # A process gives the others the address that its own host's name stands for.
    if not _is_loopback(coordinator) and _is_loopback(name := socket.gethostname()):
        line += (
            f"if they are on several hosts, give {name} its own address in /etc/hosts: "
            "its name stands for the host itself there; "
        )
    return line + "start all of them again with --resume"


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
