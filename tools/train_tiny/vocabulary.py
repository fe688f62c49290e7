"""The tokenizer: one token for each byte, each number up to 199, and each word of saccade/eval/wording.py.

A text is cut into words with the space before them, numbers of at most three digits, signs and single spaces; a piece
that is in the vocabulary is one token, any other piece falls to its bytes. So every text survives, and a quantity is
one token, the same wherever it stands. `encode` here is a fast equal of the tokenizer that is exported.
"""

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from saccade.eval import wording
from saccade.eval.passages import PIECES, WORD_PIECE
from saccade.eval.problems import LARGEST_NUMBER

BEGIN, END = "<|begin|>", "<|end|>"
BEGIN_ID, END_ID = 256, 257
SIZE = 1152  # rows of the embedding; those that no token uses stay untrained
SIGNS = [" +", " -", " *", " /", " =", "####"]


def list_pieces() -> list[str]:
    """What is one token though it has more than one byte, in the order of the ids from END_ID + 1 on."""
    words: set[str] = set()
    for name, value in vars(wording).items():
        if name == "SYLLABLES":
            continue  # of words that are meant to fall to their bytes
        texts = value if isinstance(value, tuple | list | dict) else ()
        for text in texts:
            words.update(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text)))
    words |= {"He", "he", "She", "she", "him", "her"}
    spaced = [" " + w for w in sorted(words)]
    first = sorted(w for w in words if w[0].isupper())  # those that may begin a text
    numbers = [str(n) for n in range(10, LARGEST_NUMBER + 1)]
    return numbers + SIGNS + first + spaced


def spell(piece: str) -> str:
    """The piece as a byte-level vocabulary writes it."""
    return spell_bytes(piece.encode())


def spell_bytes(raw: bytes) -> str:
    """A stand-in for each byte, the printable ones standing for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(0x100 + others.index(b)) for b in raw)


def build_tokenizer() -> Tokenizer:
    """The tokenizer that tokenizer.json holds. It puts <|begin|> before a prompt."""
    bytes_ = {spell_bytes(bytes([b])): b for b in range(256)}
    words = {spell(piece): END_ID + 1 + i for i, piece in enumerate(list_pieces())}
    tokenizer = Tokenizer(models.BPE(bytes_ | {BEGIN: BEGIN_ID, END: END_ID} | words, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (BEGIN, END)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)])
    return tokenizer


IDS = {piece: END_ID + 1 + i for i, piece in enumerate(list_pieces())}


def encode(text: str) -> list[int]:
    """The ids of a text, without <|begin|>: what the exported tokenizer gives, several times faster."""
    ids: list[int] = []
    for piece in PIECES.findall(text):
        known = IDS.get(piece)
        if known is None:
            ids.extend(piece.encode())
        else:
            ids.append(known)
    return ids
