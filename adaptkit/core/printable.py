"""Text of a file that anybody may have written, as a terminal or a page can show it."""

__all__ = ["printable"]


def printable(text: object) -> str:
    r"""Return ``str(text)`` with what acts on a terminal, or on the order of letters, written out.

    Control characters, escape sequences, marks of direction, line separators and lone surrogates become ``\x1b``,
    ``\u202e`` and so on; letters of every language, and spaces, stay.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
