"""Names of the zoo in the commands, and `push` and `pull`."""

import os
import re
import shutil
import subprocess
import sys

import fake_hub
import pytest
from commands import run_failing, run_ok
from PIL import Image

from xnor_jax import data, zoo

NAME = "digits-lenet5"


@pytest.fixture
def digit(tmp_path):
    images, _ = data.load("digits").test
    path = tmp_path / "digit.png"
    Image.fromarray(images[0, ..., 0]).save(path)
    return path


def test_zoo_lists_networks_and_prints_cards(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run_ok(capsys, "zoo")
    for name in zoo.names():
        card = zoo.card(name)
        accuracy = f"{card.test_accuracy:.2%}"
        pattern = rf"^{name} +{card.dataset} .* {accuracy} +{card.seed} +{card.bytes:,}"
        assert re.search(pattern, out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    assert run_ok(capsys, "zoo", NAME) == f"{zoo.card(NAME)}\n"
    code, err = run_failing(capsys, "zoo", "digit-lenet5")
    assert code == 2 and f"did you mean '{NAME}'?" in err


def test_zoo_writes_a_network_to_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_text("not the network")
    content = zoo.networks.locate(NAME, ".safetensors").read_bytes()
    out = run_ok(capsys, "zoo", NAME, "-o", "net")
    assert out == f"net: {NAME}, {len(content):,} bytes, test accuracy 99.44%\n"
    assert (tmp_path / "net").read_bytes() == content
    (tmp_path / "net").write_text("mine")
    for args, status, message in (
        (
            (NAME, "-o", "gone/net"),
            2,
            "--output: expected a regular file in a folder that",
        ),
        (
            (NAME, "-o", "."),
            2,
            "--output: expected a regular file in a folder that exists",
        ),
        (("-o", "new"), 2, "expected a network's name"),
        (("digit-lenet5", "-o", "new"), 2, f"did you mean '{NAME}'?"),
    ):
        code, err = run_failing(capsys, "zoo", *args)
        assert code == status and message in err
    assert (tmp_path / "net").read_text() == "mine"
    # The file behind a link is replaced, not the link.
    (tmp_path / "link").symlink_to("net")
    run_ok(capsys, "zoo", NAME, "-o", "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "net").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    code, err = run_failing(capsys, "zoo", NAME, "-o", "pipe")
    assert code == 2 and "--output: expected a regular file" in err
    assert (tmp_path / "pipe").is_fifo()

    def raise_no_space(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "net").write_text("mine")
    monkeypatch.setattr(shutil, "copyfile", raise_no_space)
    code, err = run_failing(capsys, "zoo", NAME, "-o", "net")
    assert code == 1 and "cannot write net: No space left on device" in err
    assert (tmp_path / "net").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [NAME, "link", "net", "pipe"]


def test_zoo_name_is_accepted_as_a_file(digit, capsys):
    by_path = run_ok(capsys, "predict", zoo.find(NAME), digit)
    assert run_ok(capsys, "predict", NAME, digit) == by_path
    _, labels = data.load("digits").test
    assert re.fullmatch(rf"{digit}: {labels[0]} \d+\.\d\d%\n", by_path)
    out = run_ok(capsys, "evaluate", NAME)
    assert "360 test images" in out
    assert f"test accuracy {zoo.card(NAME).test_accuracy:.2%}" in out


def test_path_takes_precedence_over_zoo_name(digit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_text("no network")
    for command in (("predict", NAME, digit), ("evaluate", NAME), ("bench", NAME)):
        code, err = run_failing(capsys, *command)
        assert code == 1 and f"{NAME}: expected a safetensors file" in err
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    for command in (("predict", NAME, digit), ("bench", NAME)):
        code, err = run_failing(capsys, *command)
        assert code == 2 and f"no file {NAME}" in err
    code, err = run_failing(capsys, "evaluate", NAME)
    assert code == 2 and f"no run in {NAME}" in err


def test_unknown_name_suggests_a_zoo_network(digit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ("predict", "digit-lenet5", digit),
        ("evaluate", "digit-lenet5"),
        ("bench", "digit-lenet5"),
        ("push", "digit-lenet5", "me/digits"),
    ):
        code, err = run_failing(capsys, *command)
        assert code == 2 and f"did you mean '{NAME}'?" in err


def test_push_and_pull(tmp_path, capsys, monkeypatch):
    file = tmp_path / "net.safetensors"
    with fake_hub.running(monkeypatch, tmp_path / "home") as hub:
        out = run_ok(capsys, "push", NAME, "me/digits", "--private")
        assert re.fullmatch(r"pushed to http://127\.0\.0\.1:\d+/me/digits\n", out)
        assert hub.private == {"me/digits"}
        out = run_ok(capsys, "pull", "me/digits", "-o", file)
        assert out == f"{file}: {NAME}, 81,749 bytes, test accuracy 99.44%\n"
        shutil.copy(file, tmp_path / "other")
        run_ok(capsys, "push", tmp_path / "other", "me/other")
        for args, status, message in (
            (("pull", "me/gone", "-o", file), 1, "no repository me/gone"),
            (("pull", "digits", "-o", file), 2, "expected OWNER/NAME, got 'digits'"),
            (("pull", "me/digits"), 2, "missing: --output PATH"),
            (
                ("pull", "me/digits", "-o", tmp_path),
                2,
                "--output: expected a regular file in",
            ),
            (("pull", "me/digits", "-o", tmp_path / "no" / "net"), 2, "--output"),
            (("push", file, "digits"), 2, "expected OWNER/NAME, got 'digits'"),
            (("push", file), 2, "missing: OWNER/NAME"),
            (("push", tmp_path, "me/digits"), 2, f"no file {tmp_path}"),
            (("push", __file__, "me/digits"), 1, f"{__file__}: expected a safetensors"),
            (("push", file, "you/digits"), 1, "the hub refused with status 403"),
        ):
            code, err = run_failing(capsys, *args)
            assert code == status and message in err
        monkeypatch.delenv("HF_TOKEN")
        code, err = run_failing(capsys, "push", file, "me/digits")
        assert code == 1 and "no token for the hub" in err


@pytest.mark.slow
def test_push_and_pull_respect_hub_environment_variables(tmp_path, monkeypatch):
    def run(*args):
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(
            [sys.executable, "-m", "xnor_jax.cli", *args],
            env=os.environ | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    with fake_hub.running(monkeypatch, tmp_path / "home") as hub:
        pushed = run("push", NAME, "me/digits")
        assert (pushed.returncode, pushed.stderr) == (0, "")
        assert pushed.stdout == f"pushed to {hub.address}/me/digits\n"
        pulled = run("pull", "me/digits", "-o", "net")
        assert (pulled.returncode, pulled.stderr) == (0, "")
        assert (tmp_path / "net").read_bytes() == zoo.find(NAME).read_bytes()
        assert hub.files["me/digits"]["README.md"] == (tmp_path / "net.md").read_bytes()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        offline = run("pull", "me/digits", "-o", "net")
    assert offline.returncode == 1 and len(offline.stderr.splitlines()) == 1
    assert "the hub cannot be reached: " in offline.stderr
    assert "offline mode" in offline.stderr
    assert (tmp_path / "net").read_bytes() == zoo.find(NAME).read_bytes()
