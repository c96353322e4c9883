"""Insert the repository's address into the files that a package index shows.

    python packaging/address.py https://HOST/OWNER/REPOSITORY [REVISION]

An index cannot follow the README's relative images and links; this script makes them
absolute and adds `[project.urls]`. It edits README.md and pyproject.toml in place: run
it in a checkout from which wheels are built.
"""

import re
import sys
from pathlib import Path


def absolute(readme: str, address: str, revision: str) -> str:
    """Return the README with absolute links; images link to raw files."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({address}/{kind}/{revision}/{target})"

    outside = r"(?![a-z][a-z+.-]*:|#|/)"
    return re.sub(rf"(!?)\[([^\]]*)\]\({outside}([^)]+)\)", link, readme)


def with_urls(project: str, address: str) -> str:
    """Return the pyproject.toml with the addresses of source, issues and changelog."""
    if "[project.urls]" in project:
        raise ValueError("pyproject.toml has [project.urls] already")
    table = (
        "[project.urls]\n"
        f'Source = "{address}"\n'
        f'Issues = "{address}/issues"\n'
        f'Changelog = "{address}/blob/main/CHANGELOG.md"\n\n'
    )
    return project.replace("[project.scripts]", f"{table}[project.scripts]", 1)


def main(address: str, revision: str = "main") -> None:
    """Edit the two files in the current directory."""
    if not re.fullmatch(r"https://[^/\s]+/\S+[^/\s]", address):
        raise SystemExit(f"expected https://HOST/OWNER/REPOSITORY, got {address}")
    readme, project = Path("README.md"), Path("pyproject.toml")
    readme.write_text(absolute(readme.read_text(), address, revision))
    project.write_text(with_urls(project.read_text(), address))


if __name__ == "__main__":
    main(*sys.argv[1:])
