"""What is asked and what came back: prompts, and the tokens of an answer with their log-probabilities.

Whoever answers (a server, another checkpoint, a file) is an Answerer. Knows no arithmetic. Next: server.py, local.py
and recorded.py, which answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from saccade.api.llm import LLM
from saccade.base.values import is_integer, is_number, show
from saccade.chat.types import ChatOptions
from saccade.errors import RequestError
from saccade.text.tokenizer import require_tokenizer

MOST_ANSWERED = 1 << 12  # tokens of an answer


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt that both sides read: one of text, messages and token ids."""

    name: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None

    def read(self, llm: LLM) -> list[int]:
        """The tokens that the checkpoint's own files make of it."""
        if self.messages is None:
            return llm.encode(self.text if self.text is not None else list(self.token_ids or ()))
        if llm.chat_format is None:
            raise RequestError(f"prompt {self.name}: messages need a chat format: {llm.no_chat}")
        tokenizer = require_tokenizer(llm.tokenizer, "a chat", llm.no_text)
        return tokenizer.encode_rendered(llm.chat_format.render(self.messages, (), ChatOptions()))


@dataclass(frozen=True)
class GivenAnswer:
    """An answer, as it was given.

    - `tokens`, `logprobs`: of the answer, in order.
    - `prompt_logprobs`: of each token of the prompt but the first; None where nobody told them.
    - `read_tokens`: the prompt as the other side read it; None where only `read_count` or nothing is known.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float] | None = None
    read_tokens: list[int] | None = None
    read_count: int | None = None


class Answerer(Protocol):
    """Who answers prompts."""

    title: str  # for people

    def answer(self, prompt: ComparedPrompt, tokens: Sequence[int], max_tokens: int) -> GivenAnswer:
        """The likeliest answer to `prompt`, which the checkpoint reads as `tokens`."""
        ...


def check_answer(answer: GivenAnswer, vocabulary: int, where: str) -> GivenAnswer:
    """RequestError for what cannot be an answer of a model with so many tokens."""
    if len(answer.tokens) != len(answer.logprobs):
        found = f"{len(answer.tokens)} tokens with {len(answer.logprobs)} log-probabilities"
        raise RequestError(f"{where}: expected a log-probability for each token, found {found}")
    if len(answer.tokens) > MOST_ANSWERED:
        raise RequestError(f"{where}: expected at most {MOST_ANSWERED} tokens, found {len(answer.tokens)}")
    for token in (*answer.tokens, *(answer.read_tokens or ())):
        if not is_integer(token) or not 0 <= token < vocabulary:
            text = f"token {show(token)} is not in the checkpoint's vocabulary of {vocabulary}"
            raise RequestError(f"{where}: {text}: another model answers")
    for logprob in (*answer.logprobs, *(answer.prompt_logprobs or ())):
        if not is_number(logprob) or logprob > 1e-3:
            raise RequestError(f"{where}: expected log-probabilities, at most 0, found {show(logprob)}")
    return answer
