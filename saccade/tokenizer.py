"""Text to token ids and back, by the checkpoint's tokenizer.json.

A checkpoint without that file is served by token ids alone: asking for text is then a clear error, nothing else is.
Knows no model and no request. Next: text.py decodes token by token; chat.py writes prompts out of messages.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from saccade.errors import ConfigError, RequestError


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
        if not path.is_file():
            return None
        try:
            encoder = Encoder.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, with a reason
            raise ConfigError(f"{path}: expected a tokenizer as the tokenizers library writes it: {error}") from None
        return cls(encoder, _find_bos(Path(directory) / "tokenizer_config.json", encoder))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint puts around one."""
        ids = self.encoder.encode(text).ids
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)


def _find_bos(path: Path, encoder: Encoder) -> int | None:
    """The token that `add_bos_token` in tokenizer_config.json asks for."""
    if not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from None
    if not isinstance(values, dict) or values.get("add_bos_token") is not True:
        return None
    token = values.get("bos_token")
    if isinstance(token, dict):  # the long spelling: {"content": "<s>", "lstrip": false, ...}
        token = token.get("content")
    bos = encoder.token_to_id(token) if isinstance(token, str) else None
    if bos is None:
        raise ConfigError(f"{path}: add_bos_token is true, but tokenizer.json has no token {token!r} (bos_token)")
    return bos


def require_tokenizer(tokenizer: Tokenizer | None, purpose: str) -> Tokenizer:
    """`tokenizer`, or a RequestError that says what it was wanted for."""
    if tokenizer is None:
        raise RequestError(f"{purpose} needs a tokenizer, but the checkpoint has no tokenizer.json: use token ids")
    return tokenizer
