"""Numbers with their nouns and the first lines of errors, for messages."""


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural unless the number is 1.

    >>> counted(1, "seed"), counted(1200, "epoch"), counted(0, "class")
    ('1 seed', '1,200 epochs', '0 classes')
    """
    plural = f"{noun}es" if noun.endswith(("s", "x", "tch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def first_line(error: BaseException) -> str:
    r"""Return at most 300 characters of an error's first line; its type if it has none.

    >>> first_line(RuntimeError("\nno memory\nmore")), first_line(RuntimeError())
    ('no memory', 'RuntimeError')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its message, if it has one.

    >>> described(KeyError("a")), described(RuntimeError())
    ("KeyError: 'a'", 'RuntimeError')
    """
    line, kind = first_line(error), type(error).__name__
    return kind if line == kind else f"{kind}: {line}"
