"""What a package index shows: metadata, and links that lead out of it."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
spec = importlib.util.spec_from_file_location(
    "address", ROOT / "packaging" / "address.py"
)
address = importlib.util.module_from_spec(spec)
spec.loader.exec_module(address)
HOME = "https://example.org/owner/name"


def test_relative_links_become_absolute_and_others_stay():
    text = "![a b](x/y.png) [c](docs/d.md#e) [f](https://g.h/i) [j](#k)"
    assert address.absolute(text, HOME, "v1") == (
        f"![a b]({HOME}/raw/v1/x/y.png) [c]({HOME}/blob/v1/docs/d.md#e) "
        "[f](https://g.h/i) [j](#k)"
    )


def test_no_link_of_the_readme_stays_relative():
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


def test_an_older_python_is_told_by_pip_and_not_by_a_build_dependency():
    loaded = tomllib.loads(PROJECT)
    minor = loaded["project"]["requires-python"].removeprefix(">=")
    # jaxlib has no release for an older Python: asked for there, pip would name it.
    (jaxlib,) = [r for r in loaded["build-system"]["requires"] if "jaxlib" in r]
    assert jaxlib.endswith(f"; python_version >= '{minor}'")
    classifiers = loaded["project"]["classifiers"]
    assert f"Programming Language :: Python :: {minor}" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers
