"""Stop strings in text that comes in pieces, some of it hidden; and texts of decoders that look at neighbours."""

import pytest
from byte_tokenizer import SPECIAL, TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from saccade.text.detokenize import TextStream
from saccade.text.stops import StopSearch

HIDDEN = ("<a>", "<ab>", "ba")
pieces = st.lists(
    st.one_of(st.text("ab<>", max_size=3).map(lambda t: (t, False)), st.sampled_from(HIDDEN).map(lambda t: (t, True))),
    max_size=12,
)
stops = st.lists(
    st.lists(st.one_of(st.text("ab<>", min_size=1, max_size=2), st.sampled_from(HIDDEN)), min_size=1, max_size=3),
    max_size=3,
).map(lambda some: tuple("".join(parts) for parts in some))


def read_slowly(pieces, stops):
    """What a reader sees who looks at both texts, with and without hidden signs, after each sign."""
    shown, signs = "", []
    for text, is_hidden in pieces:
        for sign in [text] if is_hidden else text:
            signs.append((sign, is_hidden))
            shown += "" if is_hidden else sign
            found = [len(shown) - len(stop) for stop in stops if not is_hidden and shown.endswith(stop)]
            for size in range(1, len(signs) + 1):
                if "".join(s for s, _ in signs[-size:]) in stops:
                    found.append(len(shown) - sum(len(s) for s, hid in signs[-size:] if not hid))
            if found:
                return shown[: min(found)], True
    return shown, False


@settings(max_examples=250, deadline=None)
@given(pieces, stops)
def test_the_first_complete_stop_string_ends_the_text_hidden_signs_counted_or_not(pieces, stops):
    search, shown, expected = StopSearch(stops), "", read_slowly(pieces, stops)
    for text, is_hidden in pieces:
        shown += search.push(text, is_hidden)
        assert expected[0].startswith(shown)
    assert (shown + search.finish(), search.is_found) == expected


def test_hidden_pieces_make_no_search_longer():
    search = StopSearch(("ab<x>",))
    for _ in range(1000):
        search.push("", False)
        search.push("<y>", True)
        search.push("a", False)
        assert len(search._tail) <= 8 and len(search._hidden) <= 2


def read(tokens, stop=(), end=None, before=()):
    text = TextStream(TOKENIZER.decode, stop, TOKENIZER.hidden, before)
    shown = [text.push(token) for token in tokens]
    return "".join(shown) + text.finish(end), text.is_stopped


@pytest.mark.parametrize(
    ("tokens", "stop", "end", "expected"),
    [
        ([*b"ab", SPECIAL, *b"c"], "<eos>", None, ("ab", True)),  # it is one
        ([*b"ab", SPECIAL, *b"c"], "b<eos>", None, ("a", True)),  # it ends in one
        ([*b"ab", SPECIAL, *b"cd"], "<eos>c", None, ("ab", True)),  # it begins in one
        ([*b"ab", SPECIAL, *b"cd"], "b<eos>c", None, ("a", True)),  # it spans one
        ([*b"ab", SPECIAL, *b"cde"], "b<eos>cde", None, ("a", True)),  # what is shown waits for the end of it
        ([*b"ab", SPECIAL, *b"cdx"], "b<eos>cde", None, ("abcdx", False)),
        ([SPECIAL, SPECIAL, *b"a"], "<eos><eos>", None, ("", True)),
        ([*b"ab<eos>c"], "b<eos>", None, ("a", True)),  # spelled in letters
        ([*b"a", SPECIAL, *b"b"], "ab", None, ("", True)),  # what is shown never contains a stop string
        ([*b"a", SPECIAL, *b"b"], "eos", None, ("ab", False)),  # a part of a special token's text is none
        ([*b"a", SPECIAL, *b"b"], "s>b", None, ("ab", False)),
        ([*b"x\n"], "\n<eos>", SPECIAL, ("x", True)),  # with the end token itself
        ([*b"x\n"], "\n\n<eos>", SPECIAL, ("x\n", False)),
        ([*b"x\n"], "\nq", ord("q"), ("x", True)),  # an end token that is an ordinary one
        ([0xF0, 0x9F, SPECIAL, 0x98, 0x80], "<eos>", None, ("", True)),
        ([0xF0, 0x9F, SPECIAL, 0x98, 0x80], "<eos>x", None, ("😀", False)),
    ],
)
def test_a_stop_string_may_contain_a_special_token(tokens, stop, end, expected):
    assert read(tokens, (stop,), end) == expected
    assert read(tokens, (stop, "never"), end) == expected


VOCAB = {
    "<unk>": 0, "▁": 1, "▁Hello": 2, "▁world": 3, "Hello": 4, "a": 5, "<s>": 6, "##ing": 7, ".": 8, "n't": 9,
    "b</w>": 10, "<0xC3>": 11, "<0xA9>": 12, "▁▁": 13,
}  # fmt: skip
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "metaspace": decoders.Metaspace(),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "llama": decoders.Sequence(LLAMA),
    "strip two": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 2, 0)]),
    "word pieces": decoders.WordPiece(),
    "word pieces as they are": decoders.WordPiece(cleanup=False),
    "end of word": decoders.BPEDecoder(suffix="</w>"),
    "none": None,
}


def build(decoder):
    encoder = Encoder(models.BPE(VOCAB, [], unk_token="<unk>"))
    if decoder is not None:
        encoder.decoder = decoder
    encoder.add_special_tokens(["<s>"])
    return encoder


# Byte tokens come as a whole character, or alone between others: ByteFallback takes a whole run of them for broken,
# characters that were complete before included, if its end is; no stream can take back what it has shown.
runs = st.one_of(st.integers(0, 10).map(lambda t: [t]), st.just([13]), st.just([11, 12]), st.just([5, 12, 5]))
streams = st.lists(runs, max_size=20).map(lambda some: [token for run in some for token in run])


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60, deadline=None)
@given(tokens=streams, before=st.lists(st.integers(0, 13), max_size=12))
def test_pieces_joined_are_the_tokens_decoded_at_once_whatever_the_decoder(name, tokens, before):
    encoder = build(DECODERS[name])
    oracle = PreTrainedTokenizerFast(tokenizer_object=encoder, clean_up_tokenization_spaces=False)

    def decode(ids):
        return encoder.decode(list(ids))

    def stream(**options):
        text = TextStream(decode, **options)
        return "".join([*(text.push(token) for token in tokens), text.finish()])

    at_once = oracle.decode(tokens, skip_special_tokens=True)
    assert stream(hidden={6: "<s>"}) == stream(hidden={6: "<s>"}, before=[*before, 6]) == at_once
    ordinary = [token for token in before if token not in (6, 11, 12)]
    if decode(ordinary):
        kept = oracle.decode([*ordinary, *tokens], skip_special_tokens=True)
        assert decode(ordinary) + stream(hidden={6: "<s>"}, before=ordinary) == kept


@pytest.mark.parametrize("before", [[0xF0, 0x9F], [*b"ab", 0xC3], [], [SPECIAL]])
def test_behind_half_a_character_an_answer_is_a_text_of_its_own(before):
    assert read([0x98, 0x80, *b"x"], before=before) == ("\ufffd\ufffdx", False)


def test_a_stop_string_may_be_kept_and_is_told():
    search = StopSearch(["lo w", "<u>"], is_kept=True)
    assert "".join(map(search.push, ["hel", "lo", " wor", "ld"])) + search.finish() == "hello w"
    assert search.found == "lo w"
    search = StopSearch(["a<u>"], is_kept=True)
    assert search.push("xa") + search.push("<u>", is_hidden=True) + search.finish() == "xa" and search.found == "a<u>"
