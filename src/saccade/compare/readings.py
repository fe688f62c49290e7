"""Whether both sides read a prompt as the same tokens; if not, which token differs.

A server that tells only the number of tokens is asked through its log-probabilities: of the prompts with one special
token less or more, the right one agrees with them. Next: compare.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from saccade.api.llm import LLM
from saccade.compare.answers import ComparedPrompt, GivenAnswer
from saccade.compare.report import ReadingDifference

MOST_GUESSES = 16  # readings that are tried
Left = Callable[[Sequence[int]], Tensor]  # differences of an answer's log-probabilities behind such a prompt


class PromptReading(NamedTuple):
    """The prompt that an answer follows, and how it differs from the checkpoint's."""

    tokens: list[int] | None  # None: nobody knows
    difference: ReadingDifference | None = None


def find_reading(llm: LLM, prompt: ComparedPrompt, ours: list[int], given: GivenAnswer, left: Left) -> PromptReading:
    """`left` is asked only where tokens have to be guessed."""
    is_chat, theirs, count = prompt.messages is not None, given.read_tokens, given.read_count
    if theirs is not None and theirs != ours:
        difference = describe_reading(llm, prompt.name, is_chat, ours, theirs, False)
        return PromptReading(theirs if is_chat else ours, difference)
    if theirs is not None or count is None or count == len(ours):
        return PromptReading(ours)
    if not is_chat:  # the answer followed our tokens; only the count is odd
        return PromptReading(ours, ReadingDifference(prompt.name, False, len(ours), count, None, None, None, False))
    guesses = list(guess_readings(llm, ours, count))
    if guesses:
        means = [float(left(guess).abs().mean()) for guess in guesses]
        best = min(range(len(guesses)), key=means.__getitem__)
        if means[best] <= 0.5 * float(left(ours).abs().mean()):
            return PromptReading(guesses[best], describe_reading(llm, prompt.name, True, ours, guesses[best], True))
    return PromptReading(None, ReadingDifference(prompt.name, True, len(ours), count, None, None, None, False))


def guess_readings(llm: LLM, ours: list[int], count: int) -> Iterator[list[int]]:
    """Readings of `count` tokens: one special token left out, or the first one doubled."""
    if llm.tokenizer is None:
        return
    special = llm.tokenizer.encoder.get_added_tokens_decoder()
    if count == len(ours) - 1:
        places = [0, *(place for place, token in enumerate(ours) if token in special)]
        places.append(len(ours) - 1)
        for place in list(dict.fromkeys(places))[:MOST_GUESSES]:
            yield [*ours[:place], *ours[place + 1 :]]
    elif count == len(ours) + 1:
        bos = llm.tokenizer.bos_token_id
        for token in dict.fromkeys([ours[0], *([] if bos is None else [bos])]):
            yield [token, *ours]


def describe_reading(
    llm: LLM, name: str, is_chat: bool, ours: list[int], theirs: list[int], is_inferred: bool
) -> ReadingDifference:
    """The first token that differs."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    our_token, their_token = (spell_token(llm, side[place]) if place < len(side) else None for side in (ours, theirs))
    return ReadingDifference(name, is_chat, len(ours), len(theirs), place, our_token, their_token, is_inferred)


def spell_token(llm: LLM, token: int) -> str:
    """A token for people: its text as Python writes it, and its id."""
    if llm.tokenizer is None:
        return str(token)
    return f"{llm.tokenizer.decode_whole([token])!r} ({token})"
