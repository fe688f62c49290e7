"""Text to token ids and back, by the checkpoint's tokenizer.json.

A checkpoint without that file, or with one that cannot be used, is served by token ids alone: asking for text is then
a clear error, nothing else is. Knows no model and no request. Next: api/loading/side_files.py reads the files beside
it; detokenize.py decodes token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import ByteLevel

from saccade.base.json_files import is_file_there
from saccade.base.printable import escape
from saccade.base.values import show
from saccade.errors import ConfigError, RequestError, SaccadeError

LFS = b"version https://git-lfs"  # how the few lines begin that git clones in place of a large file, without git-lfs
NO_TOKENIZER = "the checkpoint has no tokenizer.json: use token ids"


PIECE = 1 << 15  # characters: 10,000 tokens and more, some 30 ms


class TooLongError(RequestError):
    """A prompt that has more tokens than the model could take."""


class Tokenizer:
    """A tokenizer.json, and the beginning token that the files beside it ask for."""

    def __init__(self, encoder: Encoder, bos_token_id: int | None = None, obstacle: str = "") -> None:
        """`bos_token_id` is put before every prompt that does not begin with it; None: nothing is. `obstacle`: why no
        prompt can be encoded as its maker meant, while token ids and text of answers are right."""
        self.encoder = encoder
        self.bos_token_id = bos_token_id
        self.obstacle = obstacle
        self.notes: tuple[str, ...] = ()  # what of the file does not take part

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer | None":
        """The tokenizer.json of a checkpoint, None if it ships none. Raises ConfigError for a broken one."""
        path = Path(directory) / "tokenizer.json"
        if not is_file_there(path):
            return None
        with _explained(ConfigError, f"{escape(str(path))}: expected a tokenizer as the tokenizers library writes it"):
            refuse_pointer(path)
            encoder = Encoder.from_file(str(path))
            notes = still(encoder)
        found = cls(encoder)
        found.notes = tuple(f"tokenizer.json: {note}" for note in notes)
        return found

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint puts around one. Raises RequestError; a
        TooLongError for a text of far more than `most` tokens, in a time that grows with `most` alone.

        What it puts before a prompt is not put there twice: a prompt that spells those tokens out, as chat templates
        do, stays as it is.
        """
        if self.obstacle:
            raise RequestError(f"the prompt cannot be encoded: {self.obstacle}")
        self._require_less(text, most)
        with _explained(RequestError, "the prompt cannot be encoded"):
            text.encode("utf-8")  # names a lone surrogate, which the tokenizer calls a wrong type
            # As a batch, because only then other threads run meanwhile: 1 MB held all up for 22 s, and now for 0.5.
            encoding = self.encoder.encode_batch_fast([text])[0]
        ids = encoding.ids
        added = next((i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added), 0)
        if added and ids[added : 2 * added] == ids[:added]:
            ids = ids[added:]
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def encode_rendered(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of a text that spells out every special token that it should have, as chat formats write it. `most`
        as in `encode`."""
        self._require_less(text, most)
        with _explained(RequestError, "the prompt cannot be encoded"):
            text.encode("utf-8")
            return self.encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _require_less(self, text: str, most: int | None) -> None:
        """TooLongError for a text whose pieces have more than twice as many tokens: 12.5 MB took 18 s to be
        encoded and refused. A cut adds a token or two to the hundreds of a piece, whatever the tokenizer."""
        if most is None or len(text) <= max(PIECE, 4 * most):  # which costs no more than what is allowed
            return
        count = 0
        for start in range(0, len(text), PIECE):
            count += len(self.encode_rendered(text[start : start + PIECE]))
            if count > 2 * most:
                raise TooLongError(f"the prompt is too long: it has far more than {most:,} tokens")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The same with special tokens: what parsers of answers need, whose markers may be such tokens."""
        return self.encoder.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def pieces(self) -> dict[bool, dict[int, str] | None]:
        """What tokens stand for that streams of this tokenizer have met (detokenize.py), by whether special ones are
        shown; None where a token's text depends on its neighbours."""
        is_bytewise = isinstance(self.encoder.decoder, ByteLevel)
        return {shows: {} if is_bytewise else None for shows in (False, True)}

    @cached_property
    def hidden(self) -> dict[int, str]:
        """The tokens that `decode` leaves out, and their texts."""
        added = self.encoder.get_added_tokens_decoder().items()
        return {token: entry.content for token, entry in added if entry.special and entry.content}


def still(encoder: Encoder) -> list[str]:
    """Switch off what was set for training, and say what: prompts would be cut, filled up or split at random."""
    notes = []
    if encoder.truncation is not None:
        notes.append(f"truncation to {show(encoder.truncation.get('max_length'))} tokens is switched off")
    if encoder.padding is not None:
        notes.append("padding is switched off")
    encoder.no_truncation()
    encoder.no_padding()
    model = encoder.model
    for name in ("dropout", "nbest_size", "alpha"):  # of BPE; of Unigram, which this library does not save
        value = getattr(model, name, None)
        if value is None:
            continue
        setattr(model, name, None)
        if value:
            notes.append(f"{name} {show(value)} is switched off: it splits the same prompt at random")
    return notes


def refuse_pointer(path: Path) -> None:
    """Raise ValueError if a file is only what git-lfs left of it."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError("found a Git LFS pointer: run `git lfs pull` there, or download the file")


@contextmanager
def _explained(kind: type[SaccadeError], what: str) -> Iterator[None]:
    """Whatever the library raises, as one line. Its panics are no Exception but a BaseException of their own."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise kind(f"{what}: {' '.join(str(error).split())}") from None


def require_tokenizer(tokenizer: Tokenizer | None, purpose: str, obstacle: str = NO_TOKENIZER) -> Tokenizer:
    """`tokenizer`, or a RequestError that says what it was wanted for, and why there is none."""
    if tokenizer is None:
        raise RequestError(f"{purpose} needs a tokenizer, but {obstacle}")
    return tokenizer
