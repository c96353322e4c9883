"""The command line: messages in this process, training and signals in others."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from commands import run_cli

from xnor_jax import _compiled, cli
from xnor_jax.ops import available_backends, cpu
from xnor_jax.train.folder import METRICS

TRAIN = ("train", "digits-lenet5", "--epochs", "4")
# One device; optimized, because training on the digits takes longer than compiling.
ENVIRONMENT = {"COLUMNS": "200", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
EXACT_METRICS = [key for key in METRICS if key != "images_per_second"]


def start(*args, cwd, before=""):
    """Start `xnor-jax ARGS` as a process that first runs the line `before`."""
    program = f"{before}\nfrom xnor_jax.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def wait_for_epoch(folder, epoch, process):
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run: its folder and its output."""
    cwd = tmp_path_factory.mktemp("alone")
    status, out, err = finish(start(*TRAIN, cwd=cwd))
    assert status == 0, err
    return cwd / "runs" / "digits-lenet5", out


def test_train_prints_plain_lines_and_writes_its_folder(uninterrupted):
    folder, out = uninterrupted
    lines = out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 4
    assert lines[-1].startswith("test accuracy ") and "\x1b" not in out
    records = metrics(folder)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert all(tuple(r) == METRICS for r in records)
    assert f"{records[-1]['test_accuracy']:.2%}" in lines[-1]
    assert records[-1]["test_accuracy"] > 0.93
    assert records[-1]["step"] == 4 * 22
    assert all(0 < r["flip_ratio"] < 0.5 for r in records[:-1])
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "recipe.json").read_text())["epochs"] == 4
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("digits-lenet5: 1,437 training images, 4 epochs of 22")


def test_evaluate_reports_the_last_epochs_accuracy(uninterrupted, capsys):
    folder, _ = uninterrupted
    code, out, _ = run_cli(capsys, "evaluate", folder)
    assert code == 0
    assert f"test accuracy {metrics(folder)[-1]['test_accuracy']:.2%}" in out
    code, out, _ = run_cli(capsys, "evaluate", folder, "--best")
    assert f"{max(r['test_accuracy'] for r in metrics(folder)):.2%}" in out


@pytest.mark.slow
def test_resumed_run_gives_identical_metrics(uninterrupted, tmp_path):
    folder = tmp_path / "runs" / "digits-lenet5"
    process = start(*TRAIN, cwd=tmp_path)
    wait_for_epoch(folder, 2, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    # A kill between writing the checkpoint and the metrics may leave this.
    (folder / "metrics.jsonl.tmp").write_text("{")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1]) + '{"epoch": 2, "st')
    # The original options need not be repeated.
    resume = ("train", "--resume", "--output", folder)
    status, out, err = finish(start(*resume, cwd=tmp_path))
    assert status == 0, err
    assert "resuming after epoch" in out
    resumed, expected = metrics(folder), metrics(uninterrupted[0])
    assert [[r[k] for k in EXACT_METRICS] for r in resumed] == [
        [r[k] for k in EXACT_METRICS] for r in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_exits_at_once_and_can_resume(tmp_path, number):
    folder = tmp_path / "run"
    # A shell's background jobs ignore SIGINT, and their children inherit that.
    handle_sigint = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    args = (*TRAIN, "--epochs", 500, "--output", folder)
    process = start(*args, cwd=tmp_path, before=handle_sigint)
    wait_for_epoch(folder, 1, process)
    process.send_signal(number)
    begin = time.monotonic()
    status, _, err = finish(process)
    assert time.monotonic() - begin < 20
    assert status == 1
    assert err.strip() == "xnor-jax: interrupted; continue with --resume"
    assert metrics(folder)


@pytest.mark.slow
def test_full_disk_is_a_one_line_error(tmp_path):
    folder = tmp_path / "run"
    # Every write past 1 MB fails, as on a full disk.
    limit_file_size = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    )
    process = start(*TRAIN, "--output", folder, cwd=tmp_path, before=limit_file_size)
    status, _, err = finish(process)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "cannot save epoch 1" in err and "--resume" in err
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_nonfinite_loss_stops_the_run(tmp_path, capsys):
    code, _, err = run_cli(
        capsys,
        *("train", "--epochs", 2, "--no-binary", "--learning-rate", 1e30),
        *("--output", tmp_path / "run"),
    )
    assert code == 1
    assert len(err.splitlines()) == 1 and "lower learning_rate" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (
            ("train", "mnist"),
            2,
            "unknown recipe 'mnist'; expected one of digits-lenet5",
        ),
        (
            ("train", "--learning-rate", "-1"),
            2,
            "--learning-rate: expected a number above 0",
        ),
        (("train", "--learning-rate", "nan"), 2, "--learning-rate: expected a number"),
        (("train", "--learning-rate"), 2, "--learning-rate: expected a value"),
        (("train", "--epochs", "many"), 2, "--epochs: expected a whole number, got"),
        (("train", "--epochs", "2.5"), 2, "--epochs: expected a whole number, got"),
        (("train", "--epochs", ""), 2, "--epochs: expected a whole number, got ''"),
        (("train", "--epochs", "0"), 2, "--epochs: expected a whole number ≥ 1"),
        (("train", "--decay-epochs", "1", "x"), 2, "expected a whole number, got '1'"),
        (("train", "--epoch", "3"), 2, "option --epoch; did you mean --epochs?"),
        (("train", "--momentum", "1"), 2, "unknown option --momentum (see"),
        (("train", "--lr", "1"), 2, "unknown option --lr (see"),
        (("train", "--best"), 2, "unknown option --best"),
        (("train", "--seeds"), 2, "--seeds: expected a value"),
        (("train", "--seeds", "1", "-1"), 2, "--seeds: expected a whole number ≥ 0"),
        (("train", "--rule", "corected"), 2, "did you mean 'corrected'?"),
        (("train", "--model", "lenet"), 2, "did you mean 'lenet5'?"),
        (("train", "--dataset", "cifar"), 2, "did you mean 'cifar10'?"),
        (("train", "digit-lenet5"), 2, "did you mean 'digits-lenet5'?"),
        (("train", ""), 2, "unknown recipe ''"),
        (("summary", ""), 2, "unknown recipe ''"),
        (("train", "digits-lenet5", "more"), 2, "unexpected argument 'more'"),
        (("train", "--output", ""), 2, "--output: expected a path, got ''"),
        (("train", "--data-dir", "."), 2, "--data-dir: expected none for digits"),
        (("train", "--workers", "2"), 2, "--workers: expected 0 for digits"),
        (("train", "--workers", "-1"), 2, "--workers: expected a number"),
        (("train", "--devices", "0"), 2, "--devices: expected a number of at least 1"),
        (
            ("train", "--devices", "2", "--batch-size", "3"),
            2,
            "--batch-size: 3 is not divisible by 2",
        ),
        (("train", "mnist-lenet5", "--data-dir", "nowhere"), 2, "no folder nowhere"),
        (("train", "--resume", "--output", "nowhere"), 2, "no run in nowhere"),
        (("train", "--resume", "--output", "."), 2, "no run in . to resume"),
        (("train", "--resume", "--seeds", "0", "--output", "."), 2, "no run in . to"),
        (("train", "--output", "/dev/null/run"), 1, "--output"),
        (("train", "--batch-size", "5000"), 2, "--batch-size: expected at most 1437"),
        (("evaluate", "nowhere"), 2, "no run in nowhere"),
        (("evaluate", "."), 2, "no run in ."),
        (("evaluate",), 2, "missing: RUN (see xnor-jax evaluate --help)"),
        (("evaluate", ""), 2, "RUN: expected a path, got ''"),
        (("summary", "nope"), 2, "unknown recipe"),
        (("summary", "--data-dir", "."), 2, "unknown option --data-dir"),
        (("tarin",), 2, "bench, zoo, push, pull; did you mean 'train'?"),
        (("--versio",), 2, "pull; did you mean '--version'?"),
        (("",), 2, "unknown command ''"),
        ((), 2, "no command"),
    ],
)
def test_usage_errors_are_one_line(
    args, status, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(capsys, *args)
    assert code == status
    assert message in err
    assert err.startswith("xnor-jax: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_main_restores_signal_handlers(tmp_path, capsys):
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    (tmp_path / "thesis.tex").write_text("")
    code, _, err = run_cli(capsys, "train", "--output", tmp_path)
    assert code == 1 and "other files and no run" in err
    assert [signal.getsignal(number) for number in numbers] == before


def test_main_restores_warnings_and_logging(capsys):
    def state():
        hooks = warnings.showwarning, sys.unraisablehook, [*warnings.filters]
        return *hooks, logging.getLogger("asyncio").level, sys.stdout.errors

    before = state()
    for args in (("--help",), ("tarin",), ("summary", "nope"), ("train", "--help")):
        run_cli(capsys, *args)
        assert state() == before


def test_error_names_the_option_as_typed():
    message = "binary: expected True with the model m, which takes no binary"
    assert cli.as_typed(message, ["train", "--no-binary"]).startswith("--no-binary: ")
    assert cli.as_typed(message, ["train", "--binary"]).startswith("--binary: ")
    batch = "batch_size: expected no more"
    assert cli.as_typed(batch, []) == "--batch-size: expected no more"
    own = "schedule: net:f: missing 'weight_decay'; expected a function of (batch_size)"
    assert cli.as_typed(own, []) == f"--{own}"


def test_folder_of_another_run_is_refused_unchanged(uninterrupted, capsys):
    folder, _ = uninterrupted
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = run_cli(capsys, *TRAIN, "--output", folder)
    assert code == 1 and "--resume" in err
    code, _, err = run_cli(capsys, *TRAIN, "--seed", 3, "--resume", "--output", folder)
    assert code == 1 and "its seed is 0, not 3" in err
    options = ("train", "--resume", "--output", folder, "--epochs", 5)
    code, out, err = run_cli(capsys, *options)
    assert code == 1 and "its epochs is 4, not 5, and its schedule cosine" in err
    assert not out  # the header comes after the checks
    code, _, err = run_cli(capsys, "train", "cifar10-nin", *options[1:])
    assert code == 2 and "holds a run of digits-lenet5, not of cifar10-nin" in err
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after == before


def test_too_small_images_are_refused_without_a_folder(tmp_path, capsys):
    run = tmp_path / "run"
    code, _, err = run_cli(capsys, "train", "--model", "alexnet", "--output", run)
    assert code == 2 and "--model: alexnet fails for images of 28×28×1" in err
    assert "at least 67×67" in err and not run.exists()


def test_summary_lists_binary_kernels(capsys):
    code, out, _ = run_cli(capsys, "summary", "cifar10-nin")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if "×" in line][1:]
    assert [row[3] for row in rows] == ["32", *["1"] * 7, "32"]
    # In order of definition, not alphabetical.
    assert rows[0][:2] == ["conv1", "5×5×3×192"] and rows[-1][0] == "conv9"
    assert max(map(len, out.splitlines())) <= 80
    # 5×5 windows of 96 channels at 16×16 positions, for 192 channels.
    block4 = rows[3]
    assert block4[:2] == ["block4", "5×5×96×192"]
    assert 16 * 16 * 192 * 25 * 96 == 117_964_800
    assert block4[4:6] == ["16×16×192", "118M"]
    assert int(block4[6].replace(",", "")) > 25 * 96 * 192 // 8
    code, out, _ = run_cli(capsys, "summary", "mnist-lenet5", "--no-binary")
    assert "0 of 4 kernels binary" in out


def test_help_and_version(capsys):
    code, out, _ = run_cli(capsys, "--version")
    assert code == 0
    first, second = out.splitlines()
    assert first == "xnor-jax 0.1.0"
    assert second == f"backends: {', '.join(available_backends())}" + (
        f" (C++, {cpu.instruction_set()})" if cpu.is_available() else ""
    )
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0 and "mnist-lenet5" in out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    code, out, _ = run_cli(capsys, "train", "mnist-lenet5", "--help")
    assert code == 0 and "--learning-rate" in out and "0.005" in out
    assert "--image-size INT" in out and "--output PATH" in out
    assert "None" not in out


@pytest.mark.slow
def test_terminal_shows_a_progress_bar(tmp_path):
    pytest.importorskip("pty")
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "xnor_jax.cli", "train", "--epochs", "1"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "XLA_FLAGS": ""},
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:
        pass  # the other end has closed
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    for word in ("epoch 1/1", "compiling", "loss", "accuracy", "images/s", "left"):
        assert word in text
    assert Path(tmp_path / "runs" / "digits-lenet5" / "report.png").exists()


def test_version_reports_a_missing_compiled_library(capsys, monkeypatch):
    monkeypatch.setattr(_compiled, "load", lambda: None)
    code, out, _ = run_cli(capsys, "--version")
    assert code == 0 and "cpu" not in out.splitlines()[1]
    assert "THE C++ PART IS MISSING" in out


QUICK = (
    ("--help",),
    ("--version",),
    (),
    ("tarin",),
    ("train", "--help"),
    ("train", "--epoch", "3"),
    ("train", "--epochs", "many"),
    ("train", "--epochs", "0"),
    ("train", "--rule", "best"),
    ("train", "nope"),
    ("train", "--data-dir", "gone"),
    ("train", "mnist-lenet5", "--data-dir", "gone"),
    ("train", "folder-nin"),
    ("train", "--workers", "-1"),
    ("train", "--devices", "0"),
    ("train", "--seeds", "1", "1"),
    ("train", "--seeds", "1", "-1"),
    ("train", "--teacher", "gone"),
    ("train", "--coordinator", "here:1"),
    ("train", "--resume", "--output", "gone"),
    ("summary", "nope"),
    ("summary", "--rule", "best"),
    ("evaluate", "gone"),
    ("evaluate", "mnist-lenet5", "--best"),
    ("compare", "gone"),
    ("pack", "gone", "-o", "file"),
    ("push", "mnist-lenet5", "name"),
    ("predict", "gone", "also"),
    ("bench", "gone", "--backend", "tpu"),
)


def test_help_and_usage_errors_do_not_import_jax():
    program = f"""
import contextlib, io, sys
from xnor_jax import cli
found = {{}}
for args in {QUICK!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(args)
        except SystemExit as stop:
            slow = {{"jax", "numpy", "datasets"}} & set(sys.modules)
            found[args] = stop.code, len(err.getvalue().splitlines()), slow
print(found)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert eval(result.stdout) == {
        args: (0, 0, set()) if {"--help", "--version"} & {*args} else (2, 1, set())
        for args in QUICK
    }


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    handle_sigint = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    # SIGINT is sent after the command line is imported.
    ready = f"{handle_sigint}\nimport xnor_jax.cli; print('ready', flush=True)"
    for delay in (0.1, 0.4, 1.5):
        process = start(
            *TRAIN, "--output", tmp_path / "run", cwd=tmp_path, before=ready
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        status, _, err = finish(process)
        assert status == 1, err
        assert err == "xnor-jax: interrupted; continue with --resume\n"
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("args", [("--help",), ("train", "--help"), ("summary",)])
def test_closed_pipe_prints_no_error(args):
    command = [sys.executable, "-m", "xnor_jax.cli", *args]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_ascii_locale_gets_a_one_line_error(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "xnor_jax.cli", "train", "--epoch", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "did you mean --epochs?" in result.stderr
