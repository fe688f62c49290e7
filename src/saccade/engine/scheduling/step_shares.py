"""How many tokens of a step each request runs.

Half of a step belongs to the oldest prompt. In the other half decodes come first, then prompts, the shortest first.
What is left over goes to whoever can use it. So a long prompt holds up neither decodes nor short prompts behind it, and
it is never held up itself: each is the oldest one day. A step in which some decode beside prompts is smaller than
others, because those wait for it. Plain numbers: knows no pages. Next: scheduler.py.
"""

from collections.abc import Mapping, Sequence


def limit_step(wants: Sequence[int], decodes: int, batch: int, mixed: int) -> tuple[int, int]:
    """The tokens of a step, and of prompts in it, where `decodes` of the `wants` are 1: `batch`, or beside decodes what
    those leave of `mixed`, and half of it at least."""
    if not decodes or max(wants) == 1:
        return batch, batch
    prompts = max(mixed - decodes, -(-mixed // 2))
    return min(batch, decodes + prompts), prompts


def share_step(wants: Sequence[int], tokens: int, pages: Mapping[int, bytes | None], most: int) -> list[int]:
    """The tokens of each request, in the order of `wants`, which is that of arrival; `tokens` at most in all, and
    `most` for prompts, as long as all decodes run.

    `wants`: known tokens that have not run: 1 in a decode, more in a prompt. `pages`, by place in `wants`: the key of
    the page that the next token lies in, where others may find it once it is full. Who would compute the same page as
    another request waits for it, and finds it in a later step.
    """
    prompts = [i for i, want in enumerate(wants) if want > 1]
    if not prompts and len(wants) <= tokens:
        return list(wants)  # decodes alone: of 256 requests, a tenth of what a step costs the host
    sizes, claimed, left = [0] * len(wants), set[bytes](), tokens

    def give(place: int, most: int) -> None:
        nonlocal left
        page = pages.get(place)
        if page is not None and not sizes[place] and page in claimed:
            return
        size = min(wants[place] - sizes[place], most)
        if size and page is not None:
            claimed.add(page)
        sizes[place] += size
        left -= size

    oldest = prompts[0] if prompts else len(wants)
    left = _run_decodes(wants, sizes, 0, oldest, left)  # the older: they end before any prompt can have waited for ever
    if prompts:
        give(oldest, min(-(-left // 2), most))
    left = _run_decodes(wants, sizes, oldest + 1, len(wants), left)
    for i in sorted(prompts, key=lambda i: wants[i] - sizes[i]):
        give(i, left)
    return sizes


def _run_decodes(wants: Sequence[int], sizes: list[int], first: int, end: int, left: int) -> int:
    """Let decodes among these places run while tokens are left; how many are left then."""
    for i in range(first, end):
        if wants[i] == 1 and left:
            sizes[i] = 1
            left -= 1
    return left
