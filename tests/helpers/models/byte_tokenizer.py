"""A byte-level tokenizer like DeepSeek's, small enough to be seen through: token i is byte i, and a few more."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from saccade.text.tokenizer import Tokenizer as OurTokenizer

SPECIAL = 256  # the token after the 256 bytes
WORDS = ["the", "Ġcat", "Ġsat", "ab", "bc", "ðŁ", "ĺĢ"]  # the last two are the halves of an emoji, two bytes each


def build_encoder():
    """Token i is byte i; then a special token; then WORDS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes that stand for themselves
    other = [b for b in range(256) if b not in printable]
    spelling = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(other)}}
    assert sorted(spelling.values()) == alphabet
    vocab = {spelling[b]: b for b in range(256)} | {"<eos>": SPECIAL}
    vocab |= {word: SPECIAL + 1 + i for i, word in enumerate(WORDS)}
    encoder = Tokenizer(models.BPE(vocab, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(["<eos>"])
    return encoder


TOKENIZER = OurTokenizer(build_encoder())
LAST = SPECIAL + len(WORDS)
