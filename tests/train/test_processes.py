"""Runs in several processes on this host match one process, and end together."""

import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from commands import run_failing
from rich.console import Console

from xnor_jax import data
from xnor_jax.train import loop, processes, supervisor
from xnor_jax.train import recipe as recipes
from xnor_jax.train.cluster import Cluster
from xnor_jax.train.folder import METRICS, RunError, RunInfo

SECONDS = 150  # after which a process that hangs is killed
EPOCHS = 4
# The float twin and a small learning rate: rounding flips signs in a binary network,
# and Adam amplifies rounding errors to steps of the learning rate's size.
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
COMPARED_METRICS = [key for key in METRICS if key != "images_per_second"]
CLUSTER = ("--coordinator", "127.0.0.1:4321", "--num-processes", 2, "--process-id", 0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*args, devices=1):
    """Start `xnor-jax train ARGS` with `devices` virtual devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    return subprocess.Popen(
        [sys.executable, "-m", "xnor_jax.cli", "train", *map(str, args)],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )


def start_two(*args, second=(), devices=1):
    flags = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    return (
        start(*args, *flags, "--process-id", 0, devices=devices),
        start(*args, *second, *flags, "--process-id", 1, devices=devices),
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition, running):
    deadline = time.monotonic() + SECONDS
    while not condition():
        if any(p.poll() is not None for p in running) or time.monotonic() > deadline:
            for process in running:
                process.kill()
            raise AssertionError([process.communicate() for process in running])
        time.sleep(0.01)


def train_here(folder, **options):
    """Train the same run in this process alone, and return its metrics."""
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
    return [[json.loads(line)[key] for key in COMPARED_METRICS] for line in lines]


def check_same(found, expected):
    assert len(found) == len(expected) == EPOCHS
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=0.02, abs=0.003)


def check_line(err):
    """Check for one line with advice, and that any log it names is not empty."""
    assert len(err.splitlines()) == 1
    assert re.match("xnor-jax: (JAX ended this process|connection between)", err)
    assert err.endswith("restart all processes with --resume\n")
    for log in re.findall(r"\S+\.log", err):
        assert Path(log).read_text()
        Path(log).unlink()


@pytest.mark.slow
def test_lost_process_ends_the_others_and_the_run_resumes(tmp_path):
    folder = tmp_path / "run"
    first, second = start_two(*RECIPE, "--output", folder, devices=2)
    metrics_file = folder / "metrics.jsonl"
    wait_for(
        lambda: metrics_file.exists() and metrics_file.read_text(), (first, second)
    )
    second.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    finish(second)

    status, _, err = finish(first)
    assert status == 1
    check_line(err)
    assert time.monotonic() - begin < processes.HEARTBEAT_SECONDS + 30

    expected = train_here(tmp_path / "alone")
    assert 1 <= len(metrics(folder)) < EPOCHS
    check_same(train_here(folder, resume=True), expected)

    # Training is complete: the processes only restore, plot and exit together.
    first, second = start_two(*RECIPE, "--output", folder, "--resume")
    (status, out, err), other = finish(first), finish(second)
    assert (status, err) == (0, "")
    assert other == (0, "", "")  # only the first process prints
    assert "resuming after epoch" in out and "test accuracy" in out
    assert "Gloo" not in out
    check_same(metrics(folder), expected)
    assert not list(folder.glob("*.tmp*"))


@pytest.mark.slow
def test_losing_the_first_process_ends_the_others(tmp_path):
    folder = tmp_path / "run"
    first, second = start_two(*RECIPE, "--output", folder)
    wait_for((folder / "recipe.json").exists, (first, second))
    first.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    status, _, err = finish(second)
    assert status == 1
    check_line(err)
    assert time.monotonic() - begin < processes.HEARTBEAT_SECONDS + 30
    finish(first)


@pytest.mark.slow
def test_mismatched_processes_stop(tmp_path):
    folder = tmp_path / "run"
    two = start_two(*RECIPE, "--output", folder, second=("--seed", 1))
    no_coordinator = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    unconnected = start(*no_coordinator, "--process-id", 1, "--start-timeout", 1)
    for status, _, err in map(finish, two):
        assert status == 1 and len(err.splitlines()) == 1
        assert "process 1 has a different run from process 0" in err
    status, _, err = finish(unconnected)
    assert status == 1
    check_line(err)
    assert f"did not connect at {no_coordinator[1]} within 1 s" in err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (CLUSTER[:2], "--coordinator: give --process-id and --num-processes too"),
        (CLUSTER[2:], "--process-id: give --coordinator too"),
        ((*CLUSTER, "--process-id", 2), "--process-id: expected 0 to 1"),
        ((*CLUSTER, "--num-processes", 0), "--num-processes: expected at least 1"),
        ((*CLUSTER, "--coordinator", "here"), "expected HOST:PORT"),
        ((*CLUSTER, "--coordinator", "here:99999"), "expected HOST:PORT"),
        (("--start-timeout", 9), "--start-timeout: expected with --coordinator or"),
        ((*CLUSTER, "--start-timeout", 0), "--start-timeout: expected at least 1"),
        ((*CLUSTER, "--cluster"), "--cluster: it detects --coordinator"),
    ],
)
def test_usage_errors_are_one_line(args, message, capsys):
    code, err = run_failing(capsys, "train", *args)
    assert code == 2 and message in err


def test_port_in_use_is_one_line(capsys):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        flags = ("--coordinator", f"127.0.0.1:{port}")
        code, err = run_failing(capsys, "train", *CLUSTER, *flags)
    assert code == 1 and f"cannot listen on port {port}" in err


def test_missing_cluster_is_reported():
    program = (
        "from xnor_jax.train.cluster import Cluster\n"
        "from xnor_jax.train.processes import joined\n"
        "with joined(Cluster(cluster=True)): pass"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program],
        env={
            name: os.environ[name]
            for name in ("PATH", "PYTHONPATH") & os.environ.keys()
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert "OptionError: --cluster: JAX detects no cluster here" in completed.stderr


def test_explain_names_the_signal_and_the_log(tmp_path):
    cluster = Cluster("host:1", 0, 16)
    killed = supervisor.explain(signal.SIGKILL, tmp_path / "a.log", cluster)
    assert killed.startswith("this process was ended by SIGKILL; ")
    aborted = supervisor.explain(signal.SIGABRT, tmp_path / "a.log", cluster)
    assert "did not connect at host:1 within 120 s" in aborted
    for line in killed, aborted:
        assert f"; see {tmp_path}/a.log; restart all processes with" in line


ADDRESSES = {
    "localhost": "127.0.0.1",
    "me": "127.0.1.1",
    "host0": "10.9.0.1",
    "::1": "::1",
}


@pytest.mark.parametrize(
    ("coordinator", "name", "advised"),
    [
        ("host0:1234", "me", True),
        (None, "me", True),
        ("host0:1234", "host0", False),
        ("localhost:1234", "me", False),
        ("[::1]:1234", "me", False),
        ("host0:1234", "unknown", False),
    ],
)
def test_unreachable_host_gets_advice(coordinator, name, advised, monkeypatch):
    def resolve(host, _):
        if host not in ADDRESSES:
            raise socket.gaierror
        return [(None, None, None, None, (ADDRESSES[host], 0))]

    monkeypatch.setattr(processes, "_join", lambda cluster: None)
    monkeypatch.setattr(processes.socket, "gethostname", lambda: name)
    monkeypatch.setattr(processes.socket, "getaddrinfo", resolve)
    with pytest.raises(RunError) as error:
        with processes.joined(Cluster(coordinator, 0, 2, cluster=True)):
            raise jax.errors.JaxRuntimeError("UNKNOWN: Connection refused\nmore")
    line = str(error.value)
    assert "processes lost (UNKNOWN: Connection refused); " in line
    assert "\n" not in line and line.endswith("restart all processes with --resume")
    assert ("map me to its network address" in line) == advised


def test_error_without_a_message_shows_its_type(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RunError, match="the other processes: RuntimeError$"):
        with processes.joined(Cluster("host:1", 0, 2)):
            pass


def test_a_single_process_needs_no_agreement(tmp_path):
    processes.check_equal(seed=0)
    opened = []
    processes.open_together(tmp_path, lambda: opened.append(True))
    assert opened == [True] and processes.is_first()
