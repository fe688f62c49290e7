"""Stop strings in text that comes in pieces. The text of special tokens is searched too, but never shown.

Text that could begin a stop string is held back until that is decided. Knows no tokens. Next: detokenize.py, which
turns tokens into such pieces.
"""

from collections.abc import Iterator, Sequence


class StopSearch:
    """Looks for the first complete stop string, both in the shown text and in the text with hidden pieces kept.

    A hidden piece is one sign: a stop string may contain it whole, and never begins or ends inside it. So "<|user|>"
    stops at that token, "user" does not. Of several stop strings, the one that is complete first counts.
    """

    def __init__(self, stops: Sequence[str], is_kept: bool = False) -> None:
        """`is_kept`: the text ends behind the stop string, not before it."""
        self._stops, self._is_kept = tuple(stops), is_kept
        self._reach = max((len(stop) for stop in stops), default=1) - 1  # characters behind new ones that matter
        self._rest = ""  # shown text that could be the beginning of a stop string
        self._tail = ""  # the last characters, hidden ones among them
        self._hidden: list[tuple[int, int]] = []  # where hidden pieces lie in the tail
        self.found: str | None = None  # the stop string that was found: the text is complete

    @property
    def is_found(self) -> bool:
        return self.found is not None

    def push(self, text: str, is_hidden: bool = False) -> str:
        """What may be shown now that `text` has come: all but an end that could begin a stop string."""
        if self.is_found:
            return ""
        if not self._stops:
            return "" if is_hidden else text
        shown = self._rest if is_hidden else self._rest + text
        if is_hidden:
            self._hidden.append((len(self._tail), len(self._tail) + len(text)))
        self._tail += text
        if ends := [*self._find_shown(shown), *self._find_hidden(len(shown))]:
            _, start, end, self.found = min(ends)
            self._rest = ""
            return shown[: end if self._is_kept else start]
        keep = len(shown) - max(self._hold_shown(shown), self._hold_hidden())
        self._rest = shown[keep:]
        self._trim()
        return shown[:keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        rest, self._rest = self._rest, ""
        return rest

    def _find_shown(self, shown: str) -> Iterator[tuple[int, int, int, str]]:
        """For each stop string in the shown text: minus the characters behind it, where it begins and ends, and it."""
        for stop in self._stops:
            if (start := shown.find(stop)) >= 0:
                yield start + len(stop) - len(shown), start, start + len(stop), stop

    def _find_hidden(self, length: int) -> Iterator[tuple[int, int, int, str]]:
        """The same for the tail; without hidden pieces it holds nothing but shown text."""
        for stop in self._stops if self._hidden else ():
            start = self._tail.find(stop)
            while start >= 0 and (self._is_inside(start) or self._is_inside(start + len(stop))):
                start = self._tail.find(stop, start + 1)
            if start >= 0:
                end = start + len(stop)
                yield end - len(self._tail), length - self._count_shown(start), length - self._count_shown(end), stop

    def _hold_shown(self, shown: str) -> int:
        """The longest end of the shown text that begins a stop string."""
        sizes = (
            n for stop in self._stops for n in range(1, min(len(stop), len(shown) + 1)) if shown.endswith(stop[:n])
        )
        return max(sizes, default=0)

    def _hold_hidden(self) -> int:
        """The same for the tail, in characters that are shown."""
        starts = range(max(0, len(self._tail) - self._reach), len(self._tail)) if self._hidden else ()
        for start in starts:
            end = self._tail[start:]
            if not self._is_inside(start) and any(stop.startswith(end) and stop != end for stop in self._stops):
                return self._count_shown(start)
        return 0

    def _is_inside(self, place: int) -> bool:
        """Whether a place in the tail would cut a hidden piece."""
        return any(start < place < stop for start, stop in self._hidden)

    def _count_shown(self, first: int) -> int:
        """Characters of the tail from `first` on that are shown."""
        return len(self._tail) - first - sum(stop - start for start, stop in self._hidden if start >= first)

    def _trim(self) -> None:
        """Forget what no stop string can reach back to; of a hidden piece, all or nothing."""
        cut = max(0, len(self._tail) - self._reach)
        cut = next((stop for start, stop in self._hidden if start < cut < stop), cut)
        self._tail = self._tail[cut:]
        self._hidden = [(start - cut, stop - cut) for start, stop in self._hidden if start >= cut]
