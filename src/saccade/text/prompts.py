"""Prompts as callers give them: text or token ids, one or several, in lists or numpy's arrays. Next: tokenizer.py."""

from collections.abc import Sequence
from typing import Any

from saccade.base.values import is_integer, show
from saccade.errors import RequestError

Prompt = str | Sequence[int]  # numpy's arrays of one dimension as well


def is_list(value: object) -> bool:
    """Whether `value` can be a list of prompts, ids or params: a sequence, or an array with `tolist`, but no text."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def as_list(value: Any) -> list[Any]:
    """The items of what `is_list`; those of an array as Python's own numbers."""
    return list(value) if isinstance(value, Sequence) else value.tolist()


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts, whether one was given or several. A list of numbers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        raise RequestError(f"a prompt is text or a list of token ids, found {type(prompts).__name__}")
    items = as_list(prompts)
    if not items:
        raise RequestError("the list is empty; expected token ids, or prompts: one at least")
    return items if any(isinstance(item, str) or is_list(item) for item in items) else [items]


def check_ids(ids: Sequence[int]) -> list[int]:
    """Token ids as Python's own integers; RequestError for what is none, or for none at all."""
    if not is_list(ids):
        raise RequestError(f"a prompt is text or a list of token ids, found {type(ids).__name__}")
    tokens = as_list(ids)
    if not tokens:
        raise RequestError("the prompt is empty; expected at least one token")
    for place, token in enumerate(tokens):
        if not is_integer(token):
            raise RequestError(f"token {show(token)} at place {place} is no token id; expected an integer")
    return [int(token) for token in tokens]
