"""Text as it comes, for readers that are generators: they yield where they need more, and go on when it is there.

So a reader is written straight down, as for a whole text, and pieces of any size give the same result. Knows no format.
Next: calls.py and parser.py, which read.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # a reader: yields for more text, returns what it read


class IncomingText:
    """What has come and was not taken yet."""

    def __init__(self) -> None:
        self.text = ""
        self.is_ended = False  # no more will come
        self.is_cut = False  # a limit ended it: half a marker at the end would have become a whole one

    def take(self, count: int) -> str:
        """Cut `count` characters off the front."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def find(self, *marks: str, start: int = 0) -> Reading[tuple[int, str]]:
        """Where the first of `marks` stands, at or behind `start`, and which; (-1, "") if none comes."""
        while True:
            found = [(place, mark) for mark in marks if (place := self.text.find(mark, start)) >= 0]
            if found:
                return min(found)
            if self.is_ended:
                return -1, ""
            start = max(start, len(self.text) - max(map(len, marks)) + 1)
            yield

    def pass_until(self, mark: str, tell: Callable[[str], None]) -> Reading[bool]:
        """Tell and take all text before `mark`, each part as soon as it is certain; False if `mark` never comes. Half
        of it, where the text was cut, stays."""
        while True:
            place = self.text.find(mark)
            if place >= 0:
                tell(self.take(place))
                return True
            tell(self.take(len(self.text) - (0 if self.is_ended and not self.is_cut else count_begun(self.text, mark))))
            if self.is_ended:
                return False
            yield

    def starts_with(self, mark: str, start: int = 0) -> Reading[bool]:
        """Whether `mark` stands at `start`; waits only while what is there could become it. Half of it counts where the
        text was cut."""
        while len(self.text) - start < len(mark) and not self.is_ended and mark.startswith(self.text[start:]):
            yield
        return self.text.startswith(mark, start) or (self.is_cut and mark.startswith(self.text[start:]))

    def skip_blanks(self, start: int = 0) -> Reading[int]:
        """The place of the first character at or behind `start` that is no white space; the end of the text if none
        comes."""
        while True:
            place = len(self.text) - len(self.text[start:].lstrip())
            if place < len(self.text) or self.is_ended:
                return place
            yield


def count_begun(text: str, mark: str) -> int:
    """How many characters at the end of `text` could be the begin of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
