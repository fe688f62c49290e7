"""Who owns which page of the cache, and which pages nobody owns are kept for what they hold.

A page is *blank*, *owned* by one request or several, or *idle*: kept under a key, without an owner. Idle pages are
free: where no blank one is left, the least recently used is evicted. Knows no tokens: a key is bytes that stand for a
page's content. Next: prefix_keys.py makes keys, scheduler.py asks.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from saccade.kernels import PAGE


def count_pages(tokens: int) -> int:
    return -(-tokens // PAGE)


class Pages:
    """All pages. One may have several owners (a shared prefix); it is free again when the last lets go."""

    def __init__(self, count: int) -> None:
        """Pages 1 … count - 1 can be given out. Page 0 never is: padding tokens write there."""
        self.count = count
        self.owners = [0] * count
        self.evictions = 0
        self._blank = list(range(count - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that can be taken: what is only kept is in nobody's way."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that can be found, owned or idle."""
        return len(self._pages)

    def take(self, count: int) -> list[int]:
        """`count` pages with one owner each. Asking for more than are free is a mistake of the caller."""
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} free")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
        return taken

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._keys.pop(page)]
        self.evictions += 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that have one, or that are kept."""
        for page in pages:
            if self.owners[page] < 1 and page not in self._idle:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._idle.pop(page, None)
            self.owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take an owner away. Of a request's pages the last count as used least recently: without those before them
        they could not be found."""
        for page in reversed(pages):
            if self.owners[page] < 1:
                raise ValueError(f"page {page} is released but has no owner")
            self.owners[page] -= 1
            if self.owners[page] == 0 and page in self._keys:
                self._idle[page] = None
            elif self.owners[page] == 0:
                self._blank.append(page)

    def keep(self, page: int, key: bytes) -> None:
        """Let an owned page be found under `key`, unless another one with the same content can be already. From now on
        nobody may write to it."""
        if self.owners[page] < 1 or self._keys.get(page, key) != key:
            raise ValueError(f"page {page} cannot be kept: it has no owner, or another content")
        if key not in self._pages:
            self._pages[key], self._keys[page] = page, key

    def find(self, key: bytes) -> int | None:
        return self._pages.get(key)

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Keep these pages no more, or none at all. Their owners keep them; idle ones are blank again."""
        for page in list(self._keys if pages is None else pages):
            key = self._keys.pop(page, None)
            if key is not None:
                del self._pages[key]
            if page in self._idle:
                del self._idle[page]
                self._blank.append(page)
