"""Text from files and arguments, safe for a terminal: control characters are printed as text.

A tensor's name, a directory or a version in tokenizer.json may hold an escape sequence. It could clear the screen,
colour what follows or change the direction of writing. Every such text passes here twice: when it is put into a
message, and when a message is printed. Imports nothing; knows no file and no terminal.
"""

import re
import unicodedata

# Whatever is not printable in Python's sense: controls (C0, C1, DEL), marks of direction, halves of surrogate pairs,
# separators of lines, private and unassigned characters. Spaces of other widths are harmless and stay.
SUSPECT = re.compile(r"[^ -~]")


def escape(text: str) -> str:
    """`text` on one line; what is not printable, a newline too, becomes an escape as in Python: \\x1b, \\u202e."""
    return text if text.isprintable() else SUSPECT.sub(_spell, text)


def escape_lines(text: str) -> str:
    """As `escape`, but newlines and tabs stay: for whole messages."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(escape, line.split("\t"))) for line in text.split("\n"))


def shorten(text: str, most: int) -> str:
    """`escape(text)`, cut to `most` characters; a text of any length costs little."""
    shown = escape(text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _spell(match: re.Match[str]) -> str:
    char = match[0]
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    return char.encode("unicode_escape").decode("ascii")
