"""How long a request may become: the model's context and the cache limit it, and what can never fit is refused at once.

The last token is chosen but never run, so a request of n tokens needs n - 1 rows of the cache. Next: scheduler.py.
"""

from typing import NamedTuple

from saccade.errors import RequestError
from saccade.kernels import PAGE


class Limits(NamedTuple):
    """Of one request that is alone."""

    max_length: int  # the context, in tokens, prompt and answer together
    capacity: int  # rows of the cache that it can own

    @classmethod
    def of(cls, max_length: int, pages: int) -> "Limits":
        """Of a model with a context of `max_length` tokens and a cache of `pages` pages, page 0 included."""
        return cls(max_length, (pages - 1) * PAGE)

    def find_length(self, prompt: int, max_tokens: int | None) -> int:
        """The length at which a request with `prompt` tokens ends. Raises RequestError if it can never fit."""
        if prompt < 1:
            raise RequestError("the prompt is empty; expected at least one token")
        if prompt >= self.max_length:
            raise RequestError(
                f"the prompt has {prompt} tokens; the context is {self.max_length} tokens, the answer included"
            )
        if max_tokens is None:
            if prompt > self.capacity:
                raise RequestError(
                    f"the prompt has {prompt} tokens; the cache holds {self.capacity}: raise cache_tokens"
                )
            return min(self.max_length, self.capacity + 1)
        length = prompt + max_tokens
        if length > self.max_length:
            raise RequestError(
                f"max_tokens: {prompt} prompt tokens and {max_tokens} new ones make {length}; "
                f"the context is {self.max_length} tokens"
            )
        if length - 1 > self.capacity:
            raise RequestError(
                f"max_tokens: {prompt} prompt tokens and {max_tokens} new ones need {length - 1} cache rows; "
                f"the cache holds {self.capacity}: raise cache_tokens"
            )
        return length

    def check_scored(self, length: int) -> None:
        """Raises RequestError if so many tokens cannot be scored."""
        if length < 2:
            raise RequestError(f"{length} tokens to score; expected two at least, one to be given and one to be scored")
        if length > self.max_length:
            raise RequestError(f"{length} tokens to score; the context is {self.max_length} tokens")
        if length - 1 > self.capacity:
            raise RequestError(
                f"{length} tokens to score need {length - 1} cache rows; the cache holds {self.capacity}: "
                "raise cache_tokens"
            )
