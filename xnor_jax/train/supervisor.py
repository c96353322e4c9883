"""Runs one of several processes in a child, and reports in a line how it ended.

When another process is lost, JAX aborts this one from a thread of its own: there is
nothing to catch. So the work is done in a child. What native code writes there goes to
a log, and the parent, which has no part in the run, names that log in a line.
"""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from xnor_jax.train.cluster import Cluster
from xnor_jax.train.folder import RunError

_LOG = "XNOR_JAX_LOG"  # the child's log; not set in a parent


def is_worker() -> bool:
    """Whether this is the child."""
    return _LOG in os.environ


def supervise(args: Sequence[str], cluster: Cluster) -> int:
    """Run `xnor-jax ARGS` in a child to its end.

    Args:
      args: The words of the command line.
      cluster: The options among them.

    Returns:
      The exit status.

    Raises:
      RunError: If process 0 cannot listen where it should.
    """
    _check_port(cluster)
    descriptor, name = tempfile.mkstemp(prefix="xnor-jax-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "xnor_jax.cli", *args],
        # The child ends when this process does, and its end of the pipe closes.
        stdin=subprocess.PIPE,
        env={**os.environ, _LOG: name},
        # A terminal's Ctrl-C is for this process, which then ends the child.
        start_new_session=True,
    )
    status = 0
    try:
        status = child.wait()
    finally:
        child.kill()
        Console().show_cursor()
        if status >= 0:
            log.unlink(missing_ok=True)
    if status >= 0:
        return status
    if log.exists():
        print(f"xnor-jax: {explain(-status, log, cluster)}", file=sys.stderr)
    return 1


def _check_port(cluster: Cluster) -> None:
    """See that process 0 can listen; JAX's coordinator crashes where it cannot.

    Raises:
      RunError: If something else has the port.
    """
    if cluster.coordinator is None or cluster.process_id != 0:
        return
    port = int(cluster.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RunError(
                f"--coordinator: cannot listen at port {port}: {error.strerror}; give "
                "all processes another one"
            ) from error


def explain(number: int, log: Path, cluster: Cluster) -> str:
    """One line for the end of a child that a signal ended.

    Args:
      number: The signal's.
      log: Where native code has said more.
      cluster: The child's options.
    """
    name = signal.Signals(number).name
    line = f"this process was ended by {name}"
    if number == signal.SIGABRT:
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        line = (
            f"JAX ended this process ({name}): another process of the run is gone, or "
            f"they did not come together{where} in {cluster.start_timeout} s"
        )
    return f"{line}; {log} has more; start all processes again with --resume"


@contextlib.contextmanager
def worker() -> Iterator[None]:
    """Be the child: end with the parent, and write native output to the log.

    An exception is reported as usual; the parent then has nothing to add.
    """
    log = os.open(os.environ[_LOG], os.O_WRONLY | os.O_APPEND)
    sys.stdout, sys.stderr = (_diverted(number, log) for number in (1, 2))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except BaseException:
        # Once it is reported: JAX may abort before, and again when Python ends.
        atexit.register(Path(os.environ[_LOG]).unlink, missing_ok=True)
        raise


def _diverted(number: int, log: int) -> TextIO:
    """Python's stream where the descriptor pointed, which goes to the log from now."""
    own = os.dup(number)
    os.dup2(log, number)
    # Lines are written at once: an abort loses what waits.
    return os.fdopen(own, "w", buffering=1)


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock a thread would still hold at the exit.
    while os.read(0, 1):
        pass
    os._exit(1)
