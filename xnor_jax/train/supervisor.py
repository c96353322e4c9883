"""Runs one of several processes in a child, and says in a line how it ended.

When another process is lost, JAX's coordination service aborts this one from a thread
of its own, with a stack trace: there is nothing to catch. So the work is done in a
child, and the parent, which has nothing to do with JAX, reads what the child says.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from rich.console import Console

from xnor_jax.train.cluster import Cluster
from xnor_jax.train.processes import check_port

_WORKER = "XNOR_JAX_WORKER"
# Where the service begins to say that the processes have lost each other. What follows
# goes on over many lines, of which none is marked.
_LOST = re.compile(
    r"[EFW]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)"
)
# Devices of one process say it at once, piece by piece: lines run into each other.
_CHATTER = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : )*\n"
)
_NO_ANSWER = (
    r"Failed to send RPC to coordination service|absl::Status: DEADLINE_EXCEEDED"
)
_AGAIN = "start all processes again with --resume"


def is_worker() -> bool:
    """Whether this is the child."""
    return _WORKER in os.environ


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
    check_port(cluster)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "xnor_jax.cli", *args],
        # The child ends when this process does, and its end of the pipe closes.
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, _WORKER: "1"},
        # A terminal's Ctrl-C is for this process, which then ends the child.
        start_new_session=True,
    )
    assert child.stderr is not None
    said, held = False, []
    try:
        for line in child.stderr:
            if held or _LOST.match(line):
                held.append(line)
            elif not is_chatter(line):
                said = said or line.startswith("xnor-jax: ")
                print(line, end="", file=sys.stderr)
        status = child.wait()
    finally:
        child.kill()
        Console().show_cursor()
    if status >= 0:
        print(*held, sep="", end="", file=sys.stderr)
        return status
    if not said:
        reason = explain("".join(held), -status, cluster)
        print(f"xnor-jax: {reason}", file=sys.stderr)
    return 1


def is_chatter(line: str) -> bool:
    """Whether a line is nothing but how many peers Gloo has found."""
    return _CHATTER.fullmatch(line) is not None


def explain(log: str, number: int, cluster: Cluster) -> str:
    """One line for the end of a child that a signal ended.

    Args:
      log: What JAX's service said last; empty where it said nothing.
      number: The signal's.
      cluster: The child's options.
    """
    of = f" of {cluster.num_processes}" if cluster.num_processes else ""
    if "RegisterTask" in log:
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        return (
            f"the processes did not come together{where} in {cluster.start_timeout} s; "
            "start all of them, each with its own --process-id, and process 0 where "
            "--coordinator says"
        )
    if found := re.search(r"stopped sending heartbeats\):((?:\s*.*\d+,?)+)\n", log):
        gone = re.findall(r"\d+", found[1])
        several = ("process", "is") if len(gone) == 1 else ("processes", "are")
        return f"{several[0]} {', '.join(gone)}{of} {several[1]} gone; {_AGAIN}"
    if found := re.search(r"first task at the barrier: (\d+)", log):
        return f"process {found[1]}{of} has stopped: see what it said; {_AGAIN}"
    if re.search(_NO_ANSWER, log):
        return f"process 0{of} is gone; {_AGAIN}"
    if found := re.search(r"absl::Status: (.*)", log):
        return f"JAX stopped this process: {found[1]}; {_AGAIN}"
    return f"this process was ended by {signal.Signals(number).name}; {_AGAIN}"


def be_worker() -> None:
    """Prepare the child: end with the parent, and keep native output off stdout."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Native libraries print to descriptor 1 what belongs into a log. Lines are written
    # at once: an abort loses what waits.
    out, encoding = os.dup(1), sys.stdout.encoding
    os.dup2(2, 1)
    sys.stdout = os.fdopen(out, "w", buffering=1, encoding=encoding)


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock a thread would still hold at the exit.
    while os.read(0, 1):
        pass
    os._exit(1)
