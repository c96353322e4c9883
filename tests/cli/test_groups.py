"""The options of `train` in groups: each is in exactly one, with its help."""

import dataclasses
import itertools
import re
import subprocess
from collections import Counter

import pytest
from commands import run_cli, run_ok

from xnor_jax import cli
from xnor_jax.cli import groups, recipes
from xnor_jax.train.cluster import Cluster
from xnor_jax.train.recipe import PARTS, Recipe


def test_every_field_is_in_one_group():
    fields = Counter(
        field.name for group in recipes._ALL for field in dataclasses.fields(group)
    )
    classes = Recipe, recipes.RunOptions, Cluster
    wanted = [field.name for cls in classes for field in dataclasses.fields(cls)]
    assert fields == Counter(wanted)


def test_help_lists_common_options_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run_ok(capsys, "train", "mnist-lenet5", "--help")
    names = "main", "network", "training", "images", "machine", "several-hosts"
    positions = [out.index(f"{name} options") for name in names]
    assert positions == sorted(positions)
    assert out.index("--data-dir") < out.index("--rule") < out.index("--coordinator")
    assert max(map(len, out.splitlines())) <= 80
    for names in PARTS.values():
        assert ",".join(names) in re.sub(r"\s*│?\n│?\s*", "", out)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_80_columns_and_fills_its_lines(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_ok(capsys, *command.split(), "--help").splitlines()
    words = " ".join(" ".join(lines).replace("│", " ").split())
    assert "(default: )" not in words and "(default: None)" not in words
    assert max(map(len, lines)) <= 80
    # A line ends where the next word does not fit, or where a sentence ends.
    for line, next_line in itertools.pairwise(lines):
        current, following = (
            re.findall(r"^│ (?:\S.*?)? {3,}(\S.*?) *│$", text)
            for text in (line, next_line)
        )
        continued = re.match(r"│ {7,}", next_line)
        if current and following and continued and not current[0].endswith((".", ")")):
            assert len(line.rstrip("│ ")) + len(following[0].split()[0]) + 1 > 76, line


def test_completion_is_a_valid_shell_script(capsys):
    code, out, err = run_cli(capsys, "train", "--tyro-print-completion", "bash")
    assert (code or 0, err) == (0, "")
    assert "--learning-rate" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    # Lists of options are not wrapped.
    assert max(map(len, out.splitlines())) > 200


def test_group_values_round_trip():
    cls = groups.group("G", "About.", [(Recipe, "epochs"), (Cluster, "cluster")], {})
    values = groups.fill(cls, {"epochs": 3, "cluster": True, "seed": 9})
    assert (values.epochs, values.cluster, cls.__doc__) == (3, True, "About.")
    assert groups.gather([values], Cluster) == Cluster(cluster=True)
