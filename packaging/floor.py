"""Print the newest glibc and libstdc++ versions that a compiled library requires.

    python packaging/floor.py LIBRARY

Names the symbols that require them; fails if manylinux_2_28 does not allow a version.
"""

import re
import subprocess
import sys

# The newest versions that the manylinux_2_28 policy allows.
ALLOWED = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def floor(symbols: str) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Return, by library, the newest version required and the symbols that require it.

    Args:
      symbols: The output of `objdump -T`.
    """
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    asked = rf"\*UND\*.*\b({'|'.join(ALLOWED)})_([\d.]+)\)? +(\S+)$"
    for name, digits, symbol in re.findall(asked, symbols, re.MULTILINE):
        version = tuple(map(int, digits.split(".")))
        newest, those = found.get(name, ((0,), []))
        if version > newest:
            newest, those = version, []
        if version == newest:
            those.append(symbol)
        found[name] = newest, those
    return found


def main(library: str) -> None:
    """Print the versions that a library requires."""
    printed = subprocess.run(
        ["objdump", "-T", library], capture_output=True, text=True, check=True
    ).stdout
    found = floor(printed)
    if "GLIBC" not in found:
        raise SystemExit(f"{library} requires no version of glibc")
    for name, (version, symbols) in found.items():
        print(f"{name}_{'.'.join(map(str, version))}: {', '.join(sorted(symbols))}")
    if high := [name for name in found if found[name][0] > ALLOWED[name]]:
        raise SystemExit(f"{library} requires a newer {', '.join(high)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
