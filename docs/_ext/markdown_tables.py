"""Convert Markdown tables in docstrings, such as the models', for Sphinx."""

import re


def convert(lines: list[str]) -> list[str]:
    """Return the lines, with each Markdown table converted to a list-table."""
    found: list[str] = []
    for at, line in enumerate(lines):
        if not line.startswith("|"):
            found.append(line)
        elif re.fullmatch(r"[|\- :]+", line):
            continue
        else:
            if at == 0 or not lines[at - 1].startswith("|"):
                found += [".. list-table::", "   :header-rows: 1", ""]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            bullets = ["   * - ", *["     - "] * (len(cells) - 1)]
            found += [b + cell for b, cell in zip(bullets, cells, strict=True)]
    return found


def setup(app):
    """Register with Sphinx."""

    def process(app, what, name, obj, options, lines):
        lines[:] = convert(lines)
        if what == "attribute":
            # Without the empty line, Napoleon reads text before a colon as a type.
            lines.insert(0, "")

    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
