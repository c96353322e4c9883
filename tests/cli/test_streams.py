"""The commands on a folder of class folders: train, evaluate, pack, predict."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import folders
import pytest
from commands import run_failing, run_ok

import xnor_jax as xnor

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = ("--model", "lenet5", "--image-size", "16", "--batch-size", "6")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folders.class_folders(tmp_path_factory.mktemp("set"))


@pytest.mark.slow
def test_commands_run_on_class_folders(root, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "net.safetensors"
    train = ("train", "folder-nin", *SMALL, "--epochs", 2, "--data-dir", root)
    out = run_ok(capsys, *train, "--output", run)
    assert "20 training images" in out
    (_, last) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    # Neither command needs the data set's folder again.
    assert "20 training images" in run_ok(capsys, "train", "--resume", "--output", run)
    found = run_ok(capsys, "evaluate", run)
    assert f"7 test images, loss {last['test_loss']:.4f}" in found
    run_ok(capsys, "pack", run, "-o", file, "--data-dir", root)
    packed = xnor.load(file)
    assert packed.info.preprocessing.resize == 18  # for size 16, as 256 for 224
    assert packed.info.test_accuracy == pytest.approx(last["test_accuracy"])
    found = run_ok(capsys, "evaluate", file, "--data-dir", root)
    assert f"test accuracy {last['test_accuracy']:.2%}" in found
    # `predict` and `evaluate` prepare pictures alike, so the accuracy is the same.
    paths = sorted((root / "validation").rglob("*.jpg"))
    lines = run_ok(capsys, "predict", file, *paths).splitlines()
    names = [re.fullmatch(r".*: (\w+) [\d.]+%", line)[1] for line in lines]
    correct = sum(n == p.parent.name for n, p in zip(names, paths, strict=True))
    assert correct / len(paths) == pytest.approx(last["test_accuracy"])


def test_usage_and_image_errors_are_one_line(root, tmp_path, capsys):
    code, err = run_failing(capsys, "train", "folder-nin")
    assert code == 2 and "--data-dir: expected a folder of class folders" in err
    train = ("train", "folder-nin", *SMALL, "--data-dir", root)
    code, err = run_failing(capsys, *train, "--workers", "-1")
    assert code == 2 and "--workers" in err
    for options, message in (
        (("--image-size", "0"), "--image-size: expected a whole number ≥ 1"),
        (("--shift", "2"), "--shift: expected 0 with --resize-crop"),
        (("--dataset", "mnist"), "--image-size: expected none for mnist"),
    ):
        code, err = run_failing(capsys, *train, *options)
        assert code == 2 and message in err
    bad = folders.class_folders(tmp_path / "set") / "train" / "bee" / "0004.jpg"
    bad.write_text("hello")
    train = ("train", "folder-nin", *SMALL, "--data-dir", tmp_path / "set")
    code, err = run_failing(capsys, *train, "--output", tmp_path / "run")
    assert code == 1 and f"{bad} is not an image; expected one of PNG, JPEG" in err


@pytest.mark.slow
def test_unsplit_classes_use_validation_share(tmp_path, capsys):
    root, run = folders.class_folders(tmp_path / "set") / "train", tmp_path / "run"
    small = ("--image-size", 16, "--batch-size", 6, "--seed", 3, "--epochs", 1)
    train = ("train", "folder-lenet5", *small, "--data-dir", root, "--output", run)
    out = run_ok(capsys, *train, "--validation-share", 0.2)
    assert "17 training images" in out
    (last,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = run_ok(capsys, "evaluate", run, "--data-dir", root)
    assert f"3 test images, loss {last['test_loss']:.4f}" in found
    file = tmp_path / "packed"
    run_ok(capsys, "pack", run, "-o", file)
    split = ("--validation-share", 0.2, "--seed", 3)
    found = run_ok(capsys, "evaluate", file, "--data-dir", root, *split)
    assert f"3 test images, loss {last['test_loss']:.4f}" in found
    # A run's classes are those of its folder, in order.
    (root / "bee").rename(root / "dog")
    for network, options in ((run, ()), (file, split)):
        command = ("evaluate", network, "--data-dir", root, *options)
        code, err = run_failing(capsys, *command)
        assert code == 1 and "has the classes ant, bee, cat, the data set" in err
    (root / "dog").rename(root / "bee")
    code, err = run_failing(capsys, "evaluate", run, "--data-dir", root, *split)
    assert code == 2 and "expected none for a run" in err
    code, err = run_failing(capsys, "evaluate", file, "--seed", 3)
    assert code == 2 and "--seed: expected --validation-share" in err
    code, err = run_failing(capsys, "evaluate", file, "--validation-share", 1)
    assert code == 2 and "--validation-share: expected a number in [0, 1)" in err
    code, err = run_failing(capsys, *train[:-2], "--output", tmp_path / "other")
    assert code == 1 and "--validation-share 0.2" in err
    for options, message in (
        (
            ("--validation-share", "1"),
            "--validation-share: expected a number in [0, 1), got 1.0",
        ),
        (("--dataset", "mnist"), "--image-size: expected none for mnist"),
        (("--image-size", "8"), "--model: lenet5 fails for images of 8×8×3"),
    ):
        code, err = run_failing(
            capsys, *train[:-2], "--validation-share", 0.2, *options
        )
        assert code == 2 and message in err
    code, err = run_failing(capsys, "train", "digits-lenet5", "--validation-share", 0.1)
    assert code == 2 and "--validation-share: expected 0 for digits" in err


def test_summary_uses_the_image_size(capsys):
    assert "7 of 9 kernels binary" in run_ok(capsys, "summary", "folder-nin")


def children(pid):
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_exit_with_their_run(root, tmp_path, number):
    # A shell's background jobs ignore SIGINT, and their children inherit that.
    handle_sigint = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    program = f"{handle_sigint}\nfrom xnor_jax.cli import main\nmain()"
    run = tmp_path / "run"
    args = ("train", "folder-nin", *SMALL, "--epochs", 5000, "--data-dir", root)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)]
        + ["--workers", "1", "--output", str(run)],
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    try:
        # SIGKILL is sent once there are two children, the worker and the resource
        # tracker; SIGINT after the first epoch.
        ready = number == signal.SIGKILL
        while len(workers := children(process.pid)) < 2 or not (
            ready or (run / "metrics.jsonl").exists()
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        # A terminal sends SIGINT to the whole process group.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    if number == signal.SIGINT:
        assert process.returncode == 1
        # In workers Grain warns that jaxlib 0.10.0 has no hooks for its profiler.
        lines = [line for line in err.splitlines() if "WARNING:absl:Grain" not in line]
        assert lines == ["xnor-jax: interrupted; continue with --resume"]
