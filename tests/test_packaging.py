"""Packaging: links and metadata for a package index, and the glibc requirement."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def load_script(name):
    path = ROOT / "packaging" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


address, floor = load_script("address"), load_script("floor")
HOME = "https://example.org/owner/name"


def test_relative_links_become_absolute_and_others_stay():
    text = "![a b](x/y.png) [c](docs/d.md#e) [f](https://g.h/i) [j](#k)"
    assert address.absolute(text, HOME, "v1") == (
        f"![a b]({HOME}/raw/v1/x/y.png) [c]({HOME}/blob/v1/docs/d.md#e) "
        "[f](https://g.h/i) [j](#k)"
    )


def test_readme_links_become_absolute():
    readme = address.absolute((ROOT / "README.md").read_text(), HOME, "main")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(targets) > 10
    assert all(re.match(r"https?://", target) for target in targets)


def test_urls_are_added_once():
    changed = address.with_urls(PROJECT, HOME)
    urls = tomllib.loads(changed)["project"]["urls"]
    assert urls["Source"] == HOME and all(url.startswith(HOME) for url in urls.values())
    with pytest.raises(ValueError, match="already"):
        address.with_urls(changed, HOME)


def test_jaxlib_build_requirement_has_the_python_marker():
    loaded = tomllib.loads(PROJECT)
    minor = loaded["project"]["requires-python"].removeprefix(">=")
    # No jaxlib supports an older Python: without the marker pip would blame jaxlib.
    (jaxlib,) = [r for r in loaded["build-system"]["requires"] if "jaxlib" in r]
    assert jaxlib.endswith(f"; python_version >= '{minor}'")
    classifiers = loaded["project"]["classifiers"]
    assert f"Programming Language :: Python :: {minor}" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers


def test_glibc_floor_is_the_newest_undefined_symbol(tmp_path, monkeypatch, capsys):
    row = "0000000000000000 {} D{} {}\t0000000000000000 {} {}".format
    rows = [
        row(" ", "F", "*UND*", "(GLIBC_2.4)", "older"),
        row(" ", "F", "*UND*", "(GLIBC_2.27)", "powf"),
        row("w", "O", "*UND*", "(GLIBC_2.27)", "expf"),
        row(" ", "F", "*UND*", "(GLIBCXX_3.4.9)", "_ZSt9older"),
        row(" ", "F", "*UND*", " GLIBCXX_3.4.22", "_ZSt9newer"),
        row("g", "F", ".text", " GLIBC_2.99", "its_own"),
        row(" ", "F", "*UND*", " Base      ", "unversioned"),
    ]
    assert floor.floor("\n".join(rows)) == {
        "GLIBC": ((2, 27), ["powf", "expf"]),
        "GLIBCXX": ((3, 4, 22), ["_ZSt9newer"]),
    }
    objdump = tmp_path / "objdump"
    objdump.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    objdump.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    floor.main("library.so")
    assert "GLIBC_2.27: expf, powf" in capsys.readouterr().out
    objdump.write_text(objdump.read_text().replace("2.4)", "2.33)"))
    with pytest.raises(SystemExit, match="requires a newer GLIBC$"):
        floor.main("library.so")
