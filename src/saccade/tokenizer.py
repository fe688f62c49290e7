"""Text to token ids and back, by the checkpoint's tokenizer.json.

A checkpoint without that file is served by token ids alone: asking for text is then a clear error, nothing else is.
Knows no model and no request. Next: text.py decodes token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as Encoder

from saccade.errors import ConfigError, RequestError, SaccadeError
from saccade.params import is_file_there, read_object, show


class Tokenizer:
    """A tokenizer.json with the little of tokenizer_config.json that matters to it."""

    def __init__(self, encoder: Encoder, bos_token_id: int | None = None) -> None:
        """`bos_token_id` is put before every prompt that does not begin with it; None: nothing is."""
        self.encoder = encoder
        self.bos_token_id = bos_token_id

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint, None if it ships none. Raises ConfigError for a broken one."""
        path = Path(directory) / "tokenizer.json"
        if not is_file_there(path):
            return None
        with _explained(ConfigError, f"{path}: expected a tokenizer as the tokenizers library writes it"):
            encoder = Encoder.from_file(str(path))
            encoder.no_truncation()  # how a file was trained must not cut prompts, nor fill them up
            encoder.no_padding()
        return cls(encoder, _find_bos(Path(directory) / "tokenizer_config.json", encoder))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint puts around one. Raises RequestError."""
        with _explained(RequestError, "the prompt cannot be encoded"):
            text.encode("utf-8")  # names a lone surrogate, which the tokenizer calls a wrong type
            ids = self.encoder.encode(text).ids
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)


@contextmanager
def _explained(kind: type[SaccadeError], what: str) -> Iterator[None]:
    """Whatever the library raises, as one line. Its panics are no Exception but a BaseException of their own."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise kind(f"{what}: {' '.join(str(error).split())}") from None


def _find_bos(path: Path, encoder: Encoder) -> int | None:
    """The token that `add_bos_token` in tokenizer_config.json asks for."""
    values = read_object(path)
    if values is None or values.get("add_bos_token") is not True:
        return None
    token = values.get("bos_token")
    if isinstance(token, dict):  # the long spelling: {"content": "<s>", "lstrip": false, ...}
        token = token.get("content")
    with _explained(ConfigError, f"{path}: bos_token is no text"):
        bos = encoder.token_to_id(token) if isinstance(token, str) else None
    if bos is None:
        raise ConfigError(f"{path}: add_bos_token is true, but tokenizer.json has no token {show(token)} (bos_token)")
    return bos


def require_tokenizer(tokenizer: Tokenizer | None, purpose: str) -> Tokenizer:
    """`tokenizer`, or a RequestError that says what it was wanted for."""
    if tokenizer is None:
        raise RequestError(f"{purpose} needs a tokenizer, but the checkpoint has no tokenizer.json: use token ids")
    return tokenizer
