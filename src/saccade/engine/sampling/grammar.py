"""Answers that match a JSON schema, a regular expression, a grammar or a structural tag, through xgrammar.

xgrammar is imported when the first request asks. It says on the host which tokens may come next, as bit masks that
change.py applies on the device. `GrammarMatch` follows one answer; what it is asked about guesses is taken back. Knows
tokens, not requests. Next: want.py; text/enforceable.py for what is refused before.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from saccade.engine.sampling.change import MASK_BITS
from saccade.errors import MissingPackageError, RequestError
from saccade.text.enforceable import OR_ELSE, find_problem, list_formats
from saccade.text.token_bytes import TokenBytes
from saccade.text.tokenizer import NO_TOKENIZER, Tokenizer, require_tokenizer

MOST_CACHED = 256 << 20  # bytes of compiled grammars
MOST_COMPILERS = 4  # each has a vocabulary of its own: 0.3 s to make for 128,000 tokens
MOST_BLANKS = 24  # between two signs of JSON: without a limit, the bundled model goes on with line breaks for ever
MOST_TOLD = 300  # characters of an error


class Grammars:
    """Those of one engine. Any thread may compile, and need not wait for a step: xgrammar lets go of the interpreter
    meanwhile. What was compiled once comes from a cache."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: Sequence[int], obstacle: str = NO_TOKENIZER):
        """`ends`: the tokens that end an answer. `obstacle`: why there is no tokenizer, where there is none."""
        self._tokenizer, self._size, self._ends, self.obstacle = tokenizer, vocab_size, list(ends), obstacle
        self._lock = Lock()
        self._compilers: OrderedDict[frozenset[int], Any] = OrderedDict()  # by the special tokens that they allow

    def start(self, constraint: tuple[str, str]) -> "GrammarMatch":
        """A match of nothing yet. RequestError for what cannot be compiled, MissingPackageError without xgrammar."""
        compiled, ends = self.compile(constraint), self._ends or [self._size]
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=ends)
        return GrammarMatch(matcher, count_words(self._size), ends)

    def compile(self, constraint: tuple[str, str]) -> Any:
        """What xgrammar makes of a field's name and its text."""
        name, text = constraint
        compiler = self._open(name, text)
        schema = partial(compiler.compile_json_schema, max_whitespace_cnt=MOST_BLANKS)
        tag = partial(compile_tag, compiler)
        how = {"json_schema": schema, "regex": compiler.compile_regex, "structural_tag": tag}
        if problem := find_problem(name, text):
            raise RequestError(f"{name}: {problem}")
        try:
            return how.get(name, compiler.compile_grammar)(text)
        except Exception as error:  # its errors have no class of their own
            reason = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", " ".join(str(error).split()))
            raise RequestError(f"{name}: cannot be compiled: {reason[:MOST_TOLD]}") from None

    def _open(self, name: str, text: str) -> Any:
        """A compiler. No grammar allows special tokens, but a structural tag those that it writes."""
        tokenizer = require_tokenizer(self._tokenizer, f"{name}: matching it", self.obstacle)
        is_tag = name == "structural_tag"
        shown = frozenset(t for t, word in tokenizer.hidden.items() if is_tag and word in text and t not in self._ends)
        with self._lock:
            if shown not in self._compilers:
                try:
                    import xgrammar
                except ImportError as error:
                    text = f"{name} needs the package xgrammar, which cannot be imported ({error}); "
                    text += "`pip install 'saccade[serve]'` brings it"
                    raise MissingPackageError(text, name="xgrammar") from None
                # Without an end token, one behind the vocabulary stands for it, which no row of logits has.
                vocabulary = list_token_bytes(tokenizer, self._size, shown)
                info = xgrammar.TokenizerInfo(
                    vocabulary, vocab_size=self._size + 1, stop_token_ids=self._ends or [self._size]
                )
                made = xgrammar.GrammarCompiler(info, max_threads=4, cache_limit_bytes=MOST_CACHED // MOST_COMPILERS)
                self._compilers[shown] = made
                if len(self._compilers) > MOST_COMPILERS:
                    self._compilers.popitem(last=False)
            self._compilers.move_to_end(shown)
            return self._compilers[shown]


def compile_tag(compiler: Any, text: str) -> Any:
    """A structural tag, with the limit on blanks that schemas have by themselves."""
    import xgrammar

    return compiler.compile_structural_tag(xgrammar.StructuralTag.from_json(complete_tag(text)))


def complete_tag(text: str) -> dict[str, Any]:
    """The tag that a text says, with what it leaves open: blanks, and which of two schemas it is."""
    import xgrammar

    tag: dict[str, Any] = json.loads(text)
    for form in list_formats(tag):
        if "json_schema" in form:
            form.setdefault("max_whitespace_cnt", MOST_BLANKS)
        if OR_ELSE in form:
            other = form.pop(OR_ELSE)
            try:
                xgrammar.Grammar.from_structural_tag(
                    xgrammar.StructuralTag.from_json({"type": "structural_tag", "format": form})
                )
            except Exception:  # its errors have no class of their own
                form["json_schema"] = other
    return tag


def count_words(vocab_size: int) -> int:
    """Of a mask over the vocabulary and the token behind it."""
    return -(-(vocab_size + 1) // MASK_BITS)


def list_token_bytes(tokenizer: Tokenizer, size: int, shown: frozenset[int] = frozenset()) -> list[bytes]:
    """The bytes of each token; b"" for special tokens that are not `shown` and ids without one, which no grammar
    allows."""
    find, hidden = TokenBytes(tokenizer).find, tokenizer.hidden.keys() - shown
    return [b"" if token in hidden else find(token) for token in range(size)]


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
