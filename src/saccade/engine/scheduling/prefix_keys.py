"""Keys of full pages: a hash of everything that decides what a page holds.

A row of the cache depends on its token and all before it, and on the model. So the key of a page hashes its tokens
after the key of the page before, and the first one begins at a root that stands for the model and its settings. It is
SHA-256: no two contents are known that share one, and every process computes the same. Knows no pages. Next:
page_pool.py.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from saccade.kernels import PAGE


@dataclass(frozen=True)
class PrefixKeys:
    """How an engine's pages are named. `is_followed`: a drafting layer keeps rows in them too. Its row of a token also
    depends on the token after it, so keys reach one token further: the rest of a page's rows never differ by it."""

    root: bytes
    is_followed: bool = False

    def extend(self, keys: list[bytes], tokens: Sequence[int], known: int | None = None) -> None:
        """Append to the keys of a request's first pages those that more `tokens` have filled since, of which the first
        `known` are certain; None: all."""
        ahead = int(self.is_followed)
        for page in range(len(keys), ((len(tokens) if known is None else known) - ahead) // PAGE):
            start = page * PAGE + ahead if page else 0
            content = array("q", tokens[start : (page + 1) * PAGE + ahead]).tobytes()
            keys.append(sha256((keys[-1] if keys else self.root) + content).digest())


def make_root(*parts: object) -> bytes:
    """32 bytes that stand for a model and its settings. The `repr` of each part must say all that matters of it."""
    return sha256(repr(parts).encode()).digest()
