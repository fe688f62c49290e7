"""Tokens become text piece by piece, as they come.

The pieces joined are the final text. A piece never ends inside a UTF-8 character and never shows a part of a stop
string; the text ends before the stop string. Knows a decode function, no tokenizer. Next: engine.py pushes tokens.
"""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what decoding makes of bytes that are no UTF-8, or not yet
_WINDOW = 16  # unsettled tokens after which a settled border is searched for, see _settle


class TextStream:
    """The text of one request.

    A token's text can depend on its neighbours: characters are split over tokens, some decoders drop a leading space.
    So each token is decoded behind the tokens of the last settled piece, and what that adds is new. Both are a few
    tokens long, so the cost of a text is linear in its length.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._context: list[int] = []  # tokens of the last settled piece
        self._fresh: list[int] = []  # tokens whose text is not settled
        self._known = 0  # characters of decode(context + fresh) that were taken
        self._held = ""  # text that could be the beginning of a stop string
        self.is_stopped = False  # a stop string was found; the text is complete

    def push(self, token: int) -> str:
        """The text that `token` makes certain; often "" and sometimes more than its own."""
        if self.is_stopped:
            return ""
        return self._release(self._extend(token))

    def finish(self) -> str:
        """The rest, at the end of the request: what was held back, and bytes that never became a character."""
        if self.is_stopped:
            return ""
        rest = self._release(self._decode(self._context + self._fresh)[self._known :])
        self._context, self._fresh, self._known = [], [], 0
        held, self._held = self._held, ""
        return rest + held

    def _extend(self, token: int) -> str:
        """Take `token` in; the text that is certain now and was not before."""
        self._fresh.append(token)
        tokens = self._context + self._fresh
        text = self._decode(tokens)
        stable = text.rstrip(_BROKEN)  # a broken end may yet become a character
        known, self._known = self._known, max(self._known, len(stable))
        new = text[known : len(stable)]
        if len(stable) == len(text):
            if new:
                self._context, self._fresh = self._fresh, []
                self._known = len(self._decode(self._context))
            elif not self._decode([token]):
                self._fresh.pop()  # a special token: no text, and a row of them must not make the window grow
        elif len(self._fresh) > _WINDOW and (border := self._find_border(tokens, text)):
            head = self._decode(tokens[:border])
            self._context, self._fresh = [], tokens[border:]
            self._known = max(0, self._known - len(head))
            new = text[known : max(len(head), len(stable))]
        return new

    def _find_border(self, tokens: list[int], text: str) -> int:
        """Where the window can be cut in a long run of bytes that are no UTF-8; 0 if nowhere.

        A cut is right if the two sides decode to the same text alone as together: the halves of a character would
        make two broken characters instead of one. A character has at most four bytes, so four cuts are enough.
        """
        for border in range(len(tokens) - 4, len(tokens)):
            if self._decode(tokens[:border]) + self._decode(tokens[border:]) == text:
                return border
        return 0

    def _release(self, new: str) -> str:
        """What may be shown of the held text and `new`: all but a suffix that could begin a stop string."""
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:  # the one that was complete first counts, however the text came in tokens
            self.is_stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
