"""Answers that match a JSON schema, a regular expression or a grammar, through xgrammar.

xgrammar is imported when the first request asks. It says on the host which tokens may come next, as bit masks that
change.py applies on the device. `GrammarMatch` follows one answer; what it is asked about guesses is taken back. Knows
tokens, not requests. Next: want.py.
"""

import re
from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from saccade.engine.sampling.change import MASK_BITS
from saccade.errors import MissingPackageError, RequestError
from saccade.text.token_bytes import TokenBytes
from saccade.text.tokenizer import NO_TOKENIZER, Tokenizer, require_tokenizer

MOST_CACHED = 256 << 20  # bytes of compiled grammars
MOST_BLANKS = 24  # between two signs of JSON: without a limit, the bundled model goes on with line breaks for ever
MOST_TOLD = 300  # characters of an error


class Grammars:
    """Those of one engine. Any thread may compile, and need not wait for a step: xgrammar lets go of the interpreter
    meanwhile. What was compiled once comes from a cache."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: Sequence[int], obstacle: str = NO_TOKENIZER):
        """`ends`: the tokens that end an answer. `obstacle`: why there is no tokenizer, where there is none."""
        self._tokenizer, self._size, self._ends, self.obstacle = tokenizer, vocab_size, list(ends), obstacle
        self._lock = Lock()
        self._compiler: Any = None

    def start(self, constraint: tuple[str, str]) -> "GrammarMatch":
        """A match of nothing yet. RequestError for what cannot be compiled, MissingPackageError without xgrammar."""
        compiled, ends = self.compile(constraint), self._ends or [self._size]
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=ends)
        return GrammarMatch(matcher, count_words(self._size), ends)

    def compile(self, constraint: tuple[str, str]) -> Any:
        """What xgrammar makes of a field's name and its text."""
        name, text = constraint
        compiler = self._open(name)
        schema = partial(compiler.compile_json_schema, max_whitespace_cnt=MOST_BLANKS)
        how = {"json_schema": schema, "regex": compiler.compile_regex}
        try:
            return how.get(name, compiler.compile_grammar)(text)
        except Exception as error:  # its errors have no class of their own
            reason = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", " ".join(str(error).split()))
            raise RequestError(f"{name}: cannot be compiled: {reason[:MOST_TOLD]}") from None

    def _open(self, name: str) -> Any:
        with self._lock:
            if self._compiler is None:
                tokenizer = require_tokenizer(self._tokenizer, f"{name}: matching it", self.obstacle)
                try:
                    import xgrammar
                except ImportError as error:
                    text = f"{name} needs the package xgrammar, which cannot be imported ({error}); "
                    text += "`pip install 'saccade[serve]'` brings it"
                    raise MissingPackageError(text, name="xgrammar") from None
                # Without an end token, one behind the vocabulary stands for it, which no row of logits has.
                vocabulary = list_token_bytes(tokenizer, self._size)
                info = xgrammar.TokenizerInfo(
                    vocabulary, vocab_size=self._size + 1, stop_token_ids=self._ends or [self._size]
                )
                self._compiler = xgrammar.GrammarCompiler(info, max_threads=4, cache_limit_bytes=MOST_CACHED)
            return self._compiler


def count_words(vocab_size: int) -> int:
    """Of a mask over the vocabulary and the token behind it."""
    return -(-(vocab_size + 1) // MASK_BITS)


def list_token_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes of each token; b"" for special tokens and ids without one, which no grammar allows."""
    find = TokenBytes(tokenizer).find
    return [b"" if token in tokenizer.hidden else find(token) for token in range(size)]


class GrammarMatch:
    """How far one answer has matched."""

    def __init__(self, matcher: Any, words: int, ends: Sequence[int]) -> None:
        self._matcher = matcher
        bits = np.zeros(words * MASK_BITS, dtype=np.uint8)
        bits[list(ends)] = 1
        self._ends = np.packbits(bits, bitorder="little").view(np.int32)
        self._mask: Any = None  # of the tokens that may come next, once somebody asked
        self.is_ended = False  # nothing can follow but an end token

    def find_masks(self, guesses: Sequence[int]) -> list[Any]:
        """i32 [words] each: the tokens that may come next, and then behind each guess; None behind one that cannot be,
        where it does not matter."""
        if self._mask is None:
            self._mask = self._find_mask()
        masks, taken = [self._mask], 0
        for guess in guesses:
            if not self._matcher.accept_token(guess):
                break
            taken += 1
            masks.append(None if self._matcher.is_terminated() else self._find_mask())
        self._roll_back(taken)
        return masks + [None] * (len(guesses) - taken)

    def count_possible(self, guesses: Sequence[int]) -> int:
        """How many of the guesses, from the first on, can be."""
        taken = 0
        while taken < len(guesses) and self._matcher.accept_token(guesses[taken]):
            taken += 1
        self._roll_back(taken)
        return taken

    def accept(self, token: int) -> bool:
        """Go on behind `token`; False if it cannot be."""
        self._mask = None
        if not self._matcher.accept_token(token):
            return False
        self.is_ended = self._matcher.is_terminated()
        if not self.is_ended and self._matcher.is_completed():
            self._mask = self._find_mask()
            self.is_ended = not np.any(self._mask & ~self._ends)
        return True

    def _roll_back(self, taken: int) -> None:
        if taken:
            self._matcher.rollback(taken)

    def _find_mask(self) -> Any:
        mask = np.empty((1, len(self._ends)), dtype=np.int32)
        self._matcher.fill_next_token_bitmask(mask, 0)
        return mask[0]
