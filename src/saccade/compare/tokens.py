"""The tokens of an answer out of what servers write: by id where they tell it, else by text.

vLLM tells ids as `token_ids` or as texts "token_id:5". Others write texts, of which several tokens may have the same;
then the tokenizer's reading of the whole answer decides. Knows no server. Next: server.py.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from saccade.base.values import is_integer, is_number, show
from saccade.errors import RequestError
from saccade.text.token_bytes import TokenBytes
from saccade.text.tokenizer import Tokenizer

ID_MARK = "token_id:"  # vLLM's return_tokens_as_token_ids
BYTES_MARK = "bytes:"  # as OpenAI spells a part of a character


class AnswerTokens:
    """Reads answers to a checkpoint's tokens."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def read_completion(
        self, choice: Mapping[str, Any], prompt: int, who: str
    ) -> tuple[list[int], list[float], list[float] | None]:
        """Tokens and log-probabilities of an answer, and those of the prompt's `prompt` tokens but the first, if they
        were echoed."""
        told = choice.get("logprobs")
        texts, logprobs = (told.get("tokens"), told.get("token_logprobs")) if isinstance(told, dict) else (None, None)
        if not (isinstance(texts, list) and isinstance(logprobs, list) and texts):
            raise lack_logprobs(who, told)
        if len(texts) != len(logprobs):
            found = f"{len(texts)} tokens with {len(logprobs)} log-probabilities"
            raise RequestError(f"{who}: expected a log-probability for each token, found {found}")
        echoed, is_echoed = None, logprobs[0] is None and len(logprobs) >= prompt
        if is_echoed:
            echoed = self._check(logprobs[1:prompt], who)
            texts, logprobs = texts[prompt:], logprobs[prompt:]
        return (
            self._find_ids(choice.get("token_ids"), texts, [None] * len(texts), who),
            self._check(logprobs, who),
            echoed,
        )

    def read_chat(self, choice: Mapping[str, Any], who: str) -> tuple[list[int], list[float]]:
        told = choice.get("logprobs")
        rows = told.get("content") if isinstance(told, dict) else None
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            raise lack_logprobs(who, told)
        texts, spelled = [row.get("token") for row in rows], [row.get("bytes") for row in rows]
        ids = self._find_ids(choice.get("token_ids"), texts, spelled, who)
        return ids, self._check([row.get("logprob") for row in rows], who)

    def _check(self, logprobs: Sequence[Any], who: str) -> list[float]:
        for logprob in logprobs:
            if not is_number(logprob):
                raise RequestError(f"{who}: expected a log-probability for each token, found {show(logprob)}")
        return [float(logprob) for logprob in logprobs]

    def _find_ids(self, ids: Any, texts: Sequence[Any], spelled: Sequence[Any], who: str) -> list[int]:
        if isinstance(ids, list) and len(ids) == len(texts) and all(map(is_integer, ids)):
            return ids
        if all(isinstance(text, str) and text.startswith(ID_MARK) for text in texts):
            numbers = [text.removeprefix(ID_MARK) for text in texts]
            if all(number.isascii() and number.isdecimal() for number in numbers):
                return [int(number) for number in numbers]
        if self._tokenizer is None:
            raise RequestError(f"{who}: tokens come as texts, and the checkpoint has no tokenizer to read them")
        raws = [find_raw(text, bytes_) for text, bytes_ in zip(texts, spelled, strict=True)]
        found = [self._by_bytes.get(raw, []) for raw in raws]
        if all(len(same) == 1 for same in found):
            return [same[0] for same in found]
        return self._decide(raws, found, who)

    def _decide(self, raws: Sequence[bytes], found: Sequence[list[int]], who: str) -> list[int]:
        """Texts that no token has, or several: as the tokenizer reads the whole, if that fits."""
        assert self._tokenizer is not None
        whole = self._tokenizer.encode_rendered(b"".join(raws).decode(errors="replace"))
        if len(whole) == len(raws) and all(token in same or not same for token, same in zip(whole, found, strict=True)):
            return whole
        place = next(i for i, same in enumerate(found) if len(same) != 1)
        text, count = show(raws[place].decode(errors="replace")), len(found[place])
        told = (
            f"the text {text} is that of {count} tokens of the checkpoint" if count else f"no token has the text {text}"
        )
        raise RequestError(f"{who}: {told}: does it serve another model? If not, it has to tell ids (return_token_ids)")

    @cached_property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        """The tokens of each spelling."""
        assert self._tokenizer is not None
        spell, found = TokenBytes(self._tokenizer), dict[bytes, list[int]]()
        for token in range(self._vocabulary):
            if raw := spell.find(token):
                found.setdefault(raw, []).append(token)
        return found


def find_raw(text: Any, spelled: Any) -> bytes:
    """The bytes of a token as a server shows it."""
    if isinstance(spelled, list) and all(is_integer(byte) and 0 <= byte < 256 for byte in spelled) and spelled:
        return bytes(spelled)
    text = text if isinstance(text, str) else ""
    if text.startswith(BYTES_MARK + "\\x"):
        try:
            return bytes.fromhex(text.removeprefix(BYTES_MARK).replace("\\x", ""))
        except ValueError:
            pass
    return text.encode(errors="replace")


def lack_logprobs(who: str, told: Any) -> RequestError:
    return RequestError(f"{who}: expected log-probabilities of its tokens (logprobs), found {show(told)}")
