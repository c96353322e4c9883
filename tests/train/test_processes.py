"""Several real processes on this host: the numbers of one, and an end of all as one."""

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from xnor_jax import cli, data
from xnor_jax.train import loop, processes, supervisor
from xnor_jax.train import recipe as recipes
from xnor_jax.train.cluster import Cluster
from xnor_jax.train.folder import METRICS, RunError, RunInfo

SECONDS = 150  # after which a process that hangs is ended
EPOCHS = 4
# The float twin, and a small rate: rounding turns signs of a binary network, and Adam
# turns rounding into steps of the rate's size.
FIELDS = {
    "binary": False,
    "epochs": EPOCHS,
    "batch_size": 240,
    "learning_rate": 0.001,
}
RECIPE = (
    *("--no-binary", "--epochs", EPOCHS),
    *("--batch-size", 240, "--learning-rate", 0.001),
)
NUMBERS = [key for key in METRICS if key != "images_per_second"]
BY_HAND = ("--coordinator", "127.0.0.1:4321", "--num-processes", 2, "--process-id", 0)
AGAIN = "start all processes again with --resume\n"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*args, devices=1):
    """Start `xnor-jax train ARGS` on so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "xnor_jax.cli", "train", *map(str, args)],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )


def start_two(*args, second=(), devices=1):
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    return (
        start(*args, *where, "--process-id", 0, devices=devices),
        start(*args, *second, *where, "--process-id", 1, devices=devices),
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(what, running):
    end = time.monotonic() + SECONDS
    while not what():
        if any(p.poll() is not None for p in running) or time.monotonic() > end:
            for process in running:
                process.kill()
            raise AssertionError([process.communicate() for process in running])
        time.sleep(0.01)


def train_here(folder, **options):
    """The same run in a single process, this one."""
    info = RunInfo.of(
        "digits-lenet5",
        dataclasses.replace(recipes.get("digits-lenet5"), **FIELDS),
        dataset := data.load("digits"),
    )
    console = Console(file=io.StringIO())
    loop.train(info, dataset, folder, console=console, **options)
    return metrics(folder)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in NUMBERS] for line in lines]


def check_same(found, expected):
    assert len(found) == len(expected) == EPOCHS
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=0.02, abs=0.003)


def said(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, args)))
    return stop.value.code, capsys.readouterr().err


def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    first, second = start_two(*RECIPE, "--output", folder, devices=2)
    written = folder / "metrics.jsonl"
    wait_for(lambda: written.exists() and written.read_text(), (first, second))
    second.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    finish(second)

    alone = train_here(tmp_path / "alone")  # while the first one finds out
    status, _, err = finish(first)
    assert (status, err) == (1, f"xnor-jax: process 1 of 2 is gone; {AGAIN}")
    assert time.monotonic() - begin < processes.HEARTBEAT_SECONDS + 30

    assert 1 <= len(metrics(folder)) < EPOCHS
    check_same(train_here(folder, resume=True), alone)

    # Trained already: what is left is to read, to draw and to leave together.
    first, second = start_two(*RECIPE, "--output", folder, "--resume")
    (status, out, err), other = finish(first), finish(second)
    assert (status, err) == (0, "")
    assert other == (0, "", "")  # the first alone speaks
    assert "going on after epoch" in out and "test accuracy" in out
    assert "Gloo" not in out
    check_same(metrics(folder), alone)
    assert not list(folder.glob("*.tmp*"))


def test_without_the_first_the_others_end_at_once(tmp_path):
    folder = tmp_path / "run"
    first, second = start_two(*RECIPE, "--output", folder)
    wait_for((folder / "recipe.json").exists, (first, second))
    first.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    status, _, err = finish(second)
    assert (status, err) == (1, f"xnor-jax: process 0 of 2 is gone; {AGAIN}")
    assert time.monotonic() - begin < 20
    finish(first)


def test_processes_that_do_not_fit_together_stop(tmp_path):
    folder = tmp_path / "run"
    two = start_two(*RECIPE, "--output", folder, second=("--seed", 1))
    nobody = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    lonely = start(*nobody, "--process-id", 1, "--start-timeout", 1)
    for status, _, err in map(finish, two):
        assert status == 1 and len(err.splitlines()) == 1
        assert "process 1 has another run than process 0" in err
    status, _, err = finish(lonely)
    assert status == 1 and len(err.splitlines()) == 1
    assert f"did not come together at {nobody[1]} in 1 s" in err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (BY_HAND[:2], "--coordinator: give --process-id and --num-processes too"),
        (BY_HAND[2:], "--process-id: give --coordinator too"),
        ((*BY_HAND, "--process-id", 2), "--process-id: expected 0 to 1"),
        ((*BY_HAND, "--num-processes", 0), "--num-processes: expected at least 1"),
        ((*BY_HAND, "--coordinator", "here"), "expected HOST:PORT"),
        ((*BY_HAND, "--coordinator", "here:99999"), "expected HOST:PORT"),
        ((*BY_HAND, "--start-timeout", 0), "--start-timeout: expected at least 1"),
        ((*BY_HAND, "--cluster"), "--cluster: finds --coordinator itself"),
    ],
)
def test_wrong_options_are_one_line(args, words, capsys):
    code, err = said(capsys, "train", *args)
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        where = ("--coordinator", f"127.0.0.1:{port}")
        code, err = said(capsys, "train", *BY_HAND, *where)
    assert code == 1 and f"cannot listen at port {port}" in err
    assert len(err.splitlines()) == 1


def test_no_cluster_is_said():
    program = (
        "from xnor_jax.train.cluster import Cluster\n"
        "from xnor_jax.train.processes import joined\n"
        "with joined(Cluster(cluster=True)): pass"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={
            name: os.environ[name]
            for name in ("PATH", "PYTHONPATH") & os.environ.keys()
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert "OptionError: --cluster: JAX finds none here" in ran.stderr


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "F1122 client.h:80] UNAVAILABLE: The following tasks are unhealthy "
            "(stopped sending heartbeats):\n2\n11\nThe tasks have crashed.",
            "processes 2, 11 of 16 are gone; ",
        ),
        (
            "# of tasks that reached the barrier: 1/2.\nThe first task at the barrier: "
            "1. Some timed out task names:\n0\n",
            "process 1 of 16 has stopped: see what it said; ",
        ),
        (
            "F1122 client.h:80] Terminating. absl::Status: ABORTED: something new.\n",
            "JAX stopped this process: ABORTED: something new.; ",
        ),
        (
            "F1122 client.h:80] Terminating. absl::Status: DEADLINE_EXCEEDED: "
            "Deadline Exceeded\n",
            "process 0 of 16 is gone; ",
        ),
        ("", "this process was ended by SIGABRT; "),
    ],
)
def test_the_last_words_of_jax_become_a_line(log, words):
    cluster = Cluster("host:1", 0, 16)
    line = supervisor.explain(log, signal.SIGABRT, cluster)
    assert line == words + AGAIN.strip()


def test_lines_of_gloo_that_run_into_each_other_are_chatter():
    tail = (
        " is connected to 3 peer ranks. Expected number of connected peer ranks is : 3"
    )
    for line in (f"[Gloo] Rank 1{tail}", f"[Gloo] Rank 1[Gloo] Rank 0{tail}", tail, ""):
        assert supervisor.is_chatter(f"{line}\n")
    for line in (f"xnor-jax: [Gloo] Rank 1{tail}", "[Gloo] timed out", f"{tail} of 4"):
        assert not supervisor.is_chatter(f"{line}\n")


@pytest.mark.parametrize(
    ("coordinator", "address", "said"),
    [
        ("10.9.0.1:1234", "127.0.0.1", True),
        ("host0:1234", "127.0.1.1", True),
        (None, "::1", True),
        ("127.0.0.1:1234", "127.0.0.1", False),
        ("[::1]:1234", "::1", False),
        ("10.9.0.1:1234", "10.9.0.2", False),
    ],
)
def test_a_host_that_others_do_not_reach_is_said(
    coordinator, address, said, monkeypatch
):
    monkeypatch.setattr(processes, "_join", lambda cluster: None)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    with pytest.raises(RunError) as error:
        with processes.joined(Cluster(coordinator, 0, 2, cluster=True)):
            raise ValueError(
                "UNKNOWN: Gloo context initialization failed: timed out connecting: "
                f"SO_ERROR: Connection refused, remote=[{address}]:9613$0"
            )
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert line.startswith("the processes lost each other (UNKNOWN: Gloo ")
    assert line.endswith("; start all of them again with --resume")
    assert (f"stands for {address} there: give it its own address" in line) == said


def test_a_single_process_needs_no_agreement(tmp_path):
    processes.check_alike(seed=0)
    opened = []
    processes.open_together(tmp_path, lambda: opened.append(True))
    assert opened == [True] and processes.is_first()
