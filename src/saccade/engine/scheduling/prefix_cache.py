"""Pages that requests find instead of computing them, because another request began with the same tokens.

Only full pages are shared, and nobody writes to one that others can find: a request writes from `computed` on, which
lies behind all of them. Next: prefix_keys.py says when two pages hold the same, page_pool.py which are evicted.
"""

from dataclasses import dataclass, replace

from saccade.engine.scheduling.page_pool import Pages
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.scheduling.requests import Request
from saccade.kernels import PAGE


@dataclass
class PrefixTally:
    """What the prefix cache was good for. A prompt is looked up once, when it first runs."""

    looked_up: int = 0  # prompt tokens
    found: int = 0  # of those: not computed
    pages: int = 0  # kept now
    evictions: int = 0  # pages that made room for others

    @property
    def hit_rate(self) -> float:
        return self.found / max(self.looked_up, 1)

    def __str__(self) -> str:
        found = f"{self.found:,} of {self.looked_up:,} prompt tokens found ({self.hit_rate:.0%})"
        return f"prefix cache: {found}; {self.pages:,} pages kept, {self.evictions:,} evicted"


class PrefixCache:
    """What a scheduler finds in `pages`."""

    def __init__(self, keys: PrefixKeys, pages: Pages) -> None:
        self._keys, self._pages, self._tally = keys, pages, PrefixTally()

    def read_tally(self) -> PrefixTally:
        return replace(self._tally, pages=self._pages.cached, evictions=self._pages.evictions)

    def find(self, request: Request) -> None:
        """Share the pages that hold the next tokens already, in place of the request's own."""
        if not self._can_find(request, request.computed // PAGE):
            return
        if self._keys.is_followed and request.followed < request.computed:
            return
        self._keys.extend(request.keys, request.tokens, len(request.tokens) - request.unknown)
        while self._can_find(request, place := request.computed // PAGE):
            page = self._pages.find(request.keys[place])
            if page is None:
                return
            self._pages.share([page])
            self._pages.release(request.pages[place : place + 1])
            request.pages[place : place + 1] = [page]
            request.settled, request.computed = place + 1, (place + 1) * PAGE
            if self._keys.is_followed:
                request.followed = request.computed

    def find_key(self, request: Request) -> bytes | None:
        """The key of the page that the next token lies in, if others will find it there. Call `find` before."""
        place = request.computed // PAGE
        return request.keys[place] if self._can_find(request, place) and place < len(request.keys) else None

    def _can_find(self, request: Request, place: int) -> bool:
        """Whether the request need not compute the rows of that page itself. The last known token always runs: its
        logits are wanted. So are all rows of some requests, until they have had them."""
        last = len(request.tokens) - 1
        return (place + 1) * PAGE <= (min(request.reached, last) if request.is_whole else last)

    def keep(self, request: Request) -> None:
        """Let others find the pages whose rows are right, and will not be written again."""
        full = (request.followed if self._keys.is_followed else request.computed) // PAGE
        if full > request.settled:
            self._keys.extend(request.keys, request.tokens, len(request.tokens) - request.unknown)
            for place in range(request.settled, full):
                self._pages.keep(request.pages[place], request.keys[place])
            request.settled = full

    def count(self, request: Request) -> None:
        """The request runs from `computed` on: rows before that which it never had have been found."""
        if request.is_whole:
            return
        if request.reached == 0:
            self._tally.looked_up += len(request.tokens)
        found = max(0, request.computed - request.reached)
        self._tally.found += found
        request.cached_tokens += found
