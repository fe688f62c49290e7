"""How many tokens of a step each request runs.

Half of a step belongs to the oldest prompt. In the other half decodes come first, then prompts, the shortest first.
What is left over goes to whoever can use it. So a long prompt holds up neither decodes nor short prompts behind it, and
it is never held up itself: each is the oldest one day. Plain numbers: knows no pages. Next: scheduler.py.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Want(NamedTuple):
    """What a request could run."""

    tokens: int  # known ones that have not run: 1 in a decode, more in a prompt
    page: bytes | None = None  # the key of the page that the next one lies in, if others may find it once it is full


def share_step(wants: Sequence[Want], tokens: int) -> list[int]:
    """The tokens of each request, in the order of `wants`, which is that of arrival; `tokens` at most in all.

    Who would compute the same page as another request waits for it, and finds it in a later step.
    """
    sizes, claimed, left = [0] * len(wants), set[bytes](), tokens

    def give(place: int, most: int) -> None:
        nonlocal left
        page = wants[place].page
        if page is not None and not sizes[place] and page in claimed:
            return
        size = min(wants[place].tokens - sizes[place], most)
        if size and page is not None:
            claimed.add(page)
        sizes[place] += size
        left -= size

    prompts = [i for i, want in enumerate(wants) if want.tokens > 1]
    decodes = [i for i, want in enumerate(wants) if want.tokens == 1]
    oldest = prompts[0] if prompts else len(wants)
    for i in decodes:  # those that are older: they end before any prompt can have waited for ever
        if i < oldest:
            give(i, left)
    if prompts:
        give(oldest, -(-left // 2))
    for i in decodes:
        if i > oldest:
            give(i, left)
    for i in sorted(prompts, key=lambda i: wants[i].tokens - sizes[i]):
        give(i, left)
    return sizes
