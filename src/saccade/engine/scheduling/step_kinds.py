"""Which of two kinds a step is of: tokens of long prompts, whose inputs of products are rounded, or all others.

What a token gets must not depend on who else is served. So the size of a step decides nothing: a token of a long
prompt is rounded in every step, one of an answer in none, even if it is computed again. A step is of one kind, and
where tokens of both wait, the kinds take turns. Plain numbers. Next: scheduler.py, which asks; step_shares.py.
"""

from collections.abc import Sequence

# Tokens to be computed up to which a prompt is exact. Reading weights is what takes time then: 128 tokens take 28.0 ms
# of DeepSeek-V3.2's rank of eight on an H200, and 26.8 in "fp8"; 1,024 take 90 and 50. And a short prompt shares a step
# with decodes.
EXACT_PROMPT = 128


def find_border(prompt: int, computed: int) -> int:
    """The position from which on a request's tokens are exact, for a prompt of so many tokens, of which some were found
    in the cache."""
    return prompt if prompt - computed > EXACT_PROMPT else 0


class StepTurns:
    """Whose turn it is."""

    def __init__(self) -> None:
        self._rounded = False  # the latest step

    def take(self, wants: Sequence[int], rounds: Sequence[bool]) -> tuple[bool, list[int], int]:
        """Whether the next step rounds, what each request wants of it, and the decodes that run in it or wait for it.

        `wants`: tokens that each request could run; `rounds`: whether they are of a long prompt.
        """
        exact = [0 if rounded else want for want, rounded in zip(wants, rounds, strict=True)]
        decodes = exact.count(1)
        waits = any(want and rounded for want, rounded in zip(wants, rounds, strict=True))
        self._rounded = waits and (not self._rounded or not any(exact))
        if not self._rounded:
            return False, exact, decodes
        return True, [want if rounded else 0 for want, rounded in zip(wants, rounds, strict=True)], decodes
