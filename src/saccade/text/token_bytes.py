"""The bytes of single tokens, as log-probabilities of an API show them: a token may be a part of a character.

Knows no request. Next: tokenizer.py, whose tokens these are.
"""

from functools import cached_property

from saccade.text.tokenizer import Tokenizer


class TokenBytes:
    """What each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = tokenizer.encoder
        self._decoder = str(tokenizer.encoder.decoder)  # e.g. "ByteLevel(...)", "Sequence(decoders=[ByteFallback..."
        self._added = {id: token.content for id, token in self._encoder.get_added_tokens_decoder().items()}

    def find(self, token: int) -> bytes:
        """b"" for a token that the tokenizer does not have."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._encoder.id_to_token(token)
        if piece is None:
            return b""
        if "ByteLevel" in self._decoder:
            return b"".join(self._letters.get(letter) or letter.encode() for letter in piece)
        if "ByteFallback" in self._decoder and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        if "Metaspace" in self._decoder or "▁" in self._decoder:
            return piece.replace("▁", " ").encode()
        return self._encoder.decode([token], skip_special_tokens=False).encode()

    @cached_property
    def _letters(self) -> dict[str, bytes]:
        """The letter that byte-level tokenizers write for each byte: printable ones stand for themselves, the others
        follow from U+0100 on, in order."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
        return {letter: bytes([byte]) for letter, byte in letters.items()}
