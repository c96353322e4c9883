"""Supervision of one of several processes: run it in a child, and report its end.

When another process is lost, JAX aborts this one from a separate thread, with no
exception to catch. The work is therefore done in a child process. Output of its native
code goes to a log, which the parent, not part of the run, names in a one-line message.
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
    """Run `xnor-jax ARGS` in a child process, and wait for its end.

    Args:
      args: The arguments of the command line.
      cluster: The cluster options among them.

    Returns:
      The exit status.

    Raises:
      RunError: If process 0 cannot listen at the coordinator's port.
    """
    _check_port(cluster)
    descriptor, name = tempfile.mkstemp(prefix="xnor-jax-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "xnor_jax.cli", *args],
        # When this process ends, the pipe closes, and the child exits.
        stdin=subprocess.PIPE,
        env={**os.environ, _LOG: name},
        # Ctrl-C in a terminal reaches only this process, which then kills the child.
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
    """Check that process 0 can listen; otherwise JAX's coordinator would crash.

    Raises:
      RunError: If it cannot, such as when the port is in use.
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
                f"--coordinator: cannot listen on port {port}: {error.strerror}; give "
                "all processes another port"
            ) from error


def explain(number: int, log: Path, cluster: Cluster) -> str:
    """Explain in one line why a child was ended by a signal.

    Args:
      number: The number of the signal.
      log: The log of the child's native code.
      cluster: The child's options.
    """
    name = signal.Signals(number).name
    line = f"this process was ended by {name}"
    if number == signal.SIGABRT:
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        line = (
            f"JAX ended this process ({name}): another process of the run is gone, or "
            f"the processes did not connect{where} within {cluster.start_timeout} s"
        )
    return f"{line}; see {log}; restart all processes with --resume"


@contextlib.contextmanager
def worker() -> Iterator[None]:
    """Run as the child: exit with the parent, and write native output to the log.

    An exception is reported as usual; the parent then adds nothing.
    """
    log = os.open(os.environ[_LOG], os.O_WRONLY | os.O_APPEND)
    sys.stdout, sys.stderr = (_diverted(number, log) for number in (1, 2))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except BaseException:
        # Removed at exit, after the report: JAX may abort before it, or after.
        atexit.register(Path(os.environ[_LOG]).unlink, missing_ok=True)
        raise


def _diverted(number: int, log: int) -> TextIO:
    """Redirect a descriptor to the log; return a stream to its former target."""
    own = os.dup(number)
    os.dup2(log, number)
    # Line-buffered: an abort loses buffered output.
    return os.fdopen(own, "w", buffering=1)


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock this thread would still hold at exit.
    while os.read(0, 1):
        pass
    os._exit(1)
