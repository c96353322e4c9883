"""The options of `train` in groups: each is in exactly one, with its help."""

import dataclasses
import itertools
import re
import subprocess
from collections import Counter

import pytest
from commands import finished, said

from xnor_jax import cli
from xnor_jax.cli import groups, recipes
from xnor_jax.train.cluster import Cluster
from xnor_jax.train.recipe import PARTS, Recipe


def test_every_field_is_in_one_group():
    fields = Counter(
        field.name for group in recipes._ALL for field in dataclasses.fields(group)
    )
    owners = Recipe, recipes.RunOptions, Cluster
    wanted = [field.name for owner in owners for field in dataclasses.fields(owner)]
    assert fields == Counter(wanted)


def test_help_begins_with_what_a_person_needs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = finished(capsys, "train", "mnist-lenet5", "--help")
    names = "main", "network", "training", "images", "machine", "several-hosts"
    places = [out.index(f"{name} options") for name in names]
    assert places == sorted(places)
    assert out.index("--data-dir") < out.index("--rule") < out.index("--coordinator")
    assert max(map(len, out.splitlines())) <= 80
    for names in PARTS.values():
        assert ",".join(names) in re.sub(r"\s*│?\n│?\s*", "", out)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_terminal_and_fills_its_lines(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = finished(capsys, *command.split(), "--help").splitlines()
    assert max(map(len, lines)) <= 80
    # A line ends where the next word does not fit, or where a sentence ends.
    for line, below in itertools.pairwise(lines):
        words, more = (
            re.findall(r"^│ (?:\S.*?)? {3,}(\S.*?) *│$", at) for at in (line, below)
        )
        started = re.match(r"│ {7,}", below)
        if words and more and started and not words[0].endswith((".", ")")):
            assert len(line.rstrip("│ ")) + len(more[0].split()[0]) + 1 > 76, line


def test_completion_is_a_script_of_the_shell(capsys):
    code, out, err = said(capsys, "train", "--tyro-print-completion", "bash")
    assert (code or 0, err) == (0, "")
    assert "--learning-rate" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    # Lists of options are not wrapped.
    assert max(map(len, out.splitlines())) > 200


def test_values_go_into_groups_and_come_back():
    made = groups.group("G", "About.", [(Recipe, "epochs"), (Cluster, "cluster")], {})
    one = groups.fill(made, {"epochs": 3, "cluster": True, "seed": 9})
    assert (one.epochs, one.cluster, made.__doc__) == (3, True, "About.")
    assert groups.gather([one], Cluster) == Cluster(cluster=True)
