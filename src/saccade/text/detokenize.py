"""Tokens become text piece by piece, as they come.

The pieces joined are the final text. A piece never ends inside a UTF-8 character and never shows a part of a stop
string; the text ends before the stop string. Knows a decode function, no tokenizer. Next: stops.py looks for stop
strings; engine/engine.py pushes tokens.
"""

from collections.abc import Callable, Mapping, Sequence

from saccade.text.stops import StopSearch

_BROKEN = "\ufffd"  # what decoding makes of bytes that are no UTF-8, or not yet
_WINDOW = 16  # unsettled tokens after which a settled border is searched for, see _extend
_BEFORE = 8  # tokens of a prompt that are looked at for a context: a character has at most four

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one request.

    A token's text can depend on its neighbours: characters are split over tokens, some decoders drop a leading space.
    So each token is decoded behind the tokens of the last settled piece, and what that adds is new. Both are a few
    tokens long, so the cost of a text is linear in its length.

    The pieces joined are the tokens decoded at once, but for one case: ByteFallback (of SentencePiece's byte tokens)
    takes a run of bytes with a broken end for broken as a whole; a character of it that was shown stays as it is.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        hidden: Mapping[int, str] | None = None,
        before: Sequence[int] = (),
        keeps_stop: bool = False,
        pieces: dict[int, str] | None = None,
    ) -> None:
        """`hidden`: tokens that `decode` leaves out, and their texts; stop strings may contain those. `before`: the
        prompt, so that a decoder that drops the space of a first token keeps it: the text is what the answer adds to
        the prompt's. If the prompt ends with a hidden token or inside a character, the answer is a text of its own.
        `keeps_stop`: the text ends behind the stop string, not before it. `pieces`: of decoders that join the bytes of
        tokens: what tokens of whole characters stand for, gathered as they come. Behind a settled piece such a token is
        not decoded again, which saves 6 us."""
        self._decode = decode
        self._stops = StopSearch(stop, keeps_stop)
        self._shadow = hidden or {}
        self._has_stops = bool(stop)
        self._pieces = pieces
        self._context = find_context(decode, before, self._shadow)  # tokens of the last settled piece
        self._fresh: list[int] = []  # tokens whose text is not settled
        self._known = (
            len(decode(self._context)) if self._context else 0
        )  # characters of context + fresh that were taken

    @property
    def is_stopped(self) -> bool:
        """A stop string was found; the text is complete."""
        return self._stops.found is not None

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    def push(self, token: int, is_searched: bool = True) -> str:
        """The text that `token` makes certain; often "" and sometimes more than its own. No stop string begins in it
        unless it `is_searched`."""
        if self.is_stopped:
            return ""
        if self._pieces and not self._fresh and (piece := self._pieces.get(token)) is not None:
            self._context, self._known = [token], len(piece)
            return self._stops.push(piece) if self._has_stops and is_searched else piece
        if not is_searched:
            return "" if token in self._shadow else self._extend(token)
        if token in self._shadow:  # it stands behind the text that is certain so far
            return self._stops.push(self._shadow[token], is_hidden=True)
        return self._stops.push(self._extend(token))

    def finish(self, end: int | None = None) -> str:
        """The rest, at the end of the request: what was held back, and bytes that never became a character. `end` is
        the end token, if one was chosen: never shown, but a stop string may reach into it."""
        if self.is_stopped:
            return ""
        rest = self._stops.push(self._decode(self._context + self._fresh)[self._known :])
        self._context, self._fresh, self._known = [], [], 0
        if end is not None and not self.is_stopped:
            rest += self._stops.push(self._shadow.get(end) or self._decode([end]), is_hidden=True)
        return rest + self._stops.finish()

    def _extend(self, token: int) -> str:
        """Take `token` in; the text that is certain now and was not before."""
        self._fresh.append(token)
        tokens = self._context + self._fresh
        text = self._decode(tokens)
        stable = text.rstrip(_BROKEN)  # a broken end may yet become a character
        known, self._known = self._known, max(self._known, len(stable))
        new = text[known : len(stable)]
        if len(stable) == len(text):
            # Where these tokens are nothing by themselves (a space that a decoder drops in front), they are no context:
            # behind them the next token would be the first again, and lose its own.
            if new and (alone := self._decode(self._fresh)):
                if self._pieces is not None and self._fresh == [token] and _BROKEN not in alone:
                    self._pieces[token] = alone
                self._context, self._fresh, self._known = self._fresh, [], len(alone)
            elif not new and len(self._fresh) > _WINDOW:
                self._fresh.pop()  # a row of tokens without text must not make the window grow
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
            tail = self._decode(tokens[border:])
            if tail and self._decode(tokens[:border]) + tail == text:
                return border
        return 0


class TextOffsets:
    """Where in a text each of its tokens begins. Tokens that `decode` leaves out take no room, and neither does a part
    of a character but the last."""

    def __init__(self, decode: Decode, hidden: Mapping[int, str], before: Sequence[int] = (), start: int = 0) -> None:
        """`before`: the prompt of the text, which ends at `start`."""
        self._stream, self.place = TextStream(decode, hidden=hidden, before=before), start

    def take(self, token: int) -> int:
        place = self.place
        self.place += len(self._stream.push(token))
        return place


def find_context(decode: Decode, before: Sequence[int], hidden: Mapping[int, str]) -> list[int]:
    """The fewest last tokens of a prompt that are whole characters; [] if the prompt ends inside one, or hidden."""
    if not before or before[-1] in hidden:
        return []
    for size in range(1, min(_BEFORE, len(before)) + 1):
        tokens = list(before[-size:])
        text = decode(tokens)
        if text and not text.endswith(_BROKEN):
            return tokens
    return []
