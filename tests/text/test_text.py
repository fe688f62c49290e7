"""Streamed text: pieces joined are the text, characters stay whole, stop strings stay hidden."""

import json
import time
from types import SimpleNamespace

import pytest
from byte_tokenizer import LAST, SPECIAL, TOKENIZER, build_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import ByteLevel, Sequence, Strip
from tokenizers.models import WordLevel

from saccade.errors import ConfigError, RequestError
from saccade.text.detokenize import TextStream
from saccade.text.tokenizer import Tokenizer as OurTokenizer
from saccade.text.tokenizer import require_tokenizer


def stream(tokens, stop=()):
    text = TextStream(TOKENIZER.decode, stop)
    pieces = [text.push(token) for token in tokens]
    return [*pieces, text.finish()], text


def cut_at_first_stop(text, stop):
    """What a reader sees who stops as soon as the letters read so far end with a stop string."""
    for end in range(len(text) + 1):
        found = [len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(found)], True
    return text, False


emoji = st.sampled_from([list("😀".encode()), list("é".encode()), list("日".encode()), [SPECIAL + 6, SPECIAL + 7]])
token_runs = st.lists(
    st.one_of(st.integers(0, LAST).map(lambda t: [t]), st.sampled_from(b"abc").map(lambda b: [b]), emoji), max_size=40
).map(lambda runs: [token for run in runs for token in run])
stops = st.lists(st.text("abc é😀", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(token_runs)
def test_pieces_joined_are_the_whole_text(tokens):
    pieces, _ = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens)


@settings(max_examples=300, deadline=None)
@given(token_runs, stops)
def test_with_special_tokens_shown_they_are_text_like_any_other(tokens, stop):
    """As parsers of answers need it, whose markers may be special tokens."""
    text = TextStream(TOKENIZER.decode_whole, (*stop, "s>b"))
    shown = "".join([text.push(token) for token in tokens]) + text.finish()
    assert (shown, text.is_stopped) == cut_at_first_stop(TOKENIZER.decode_whole(tokens), (*stop, "s>b"))
    assert TOKENIZER.decode_whole([SPECIAL]) == "<eos>" and TOKENIZER.decode([SPECIAL]) == ""


@settings(max_examples=300, deadline=None)
@given(token_runs, stops)
def test_the_text_ends_before_the_first_stop_string_and_shows_no_part_of_it(tokens, stop):
    pieces, text = stream(tokens, stop)
    shown, expected = "", cut_at_first_stop(TOKENIZER.decode(tokens), stop)
    for piece in pieces:
        shown += piece
        assert expected[0].startswith(shown)
    assert (shown, text.is_stopped) == expected


@given(st.text(max_size=20))
def test_a_character_is_never_split(wanted):
    pieces, _ = stream(list(wanted.encode()))
    assert "".join(pieces) == wanted
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in wanted
    # One byte a token: each character comes with its last byte, U+FFFD itself only when something follows.
    if "\ufffd" not in wanted:
        assert [piece for piece in pieces if piece] == list(wanted)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0x80, 0x9F, 0xC3, 0xE6, 0xF0, 0xF5, SPECIAL, 0x41]), max_size=120))
def test_long_runs_of_broken_bytes_decode_as_if_at_once(tokens):
    pieces, _ = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens)


@pytest.mark.parametrize("size", range(3))
def test_a_run_of_halves_is_not_cut_inside_one(size):
    tokens = [*[0x80] * size, *[0xF0, 0x9F, 0x98] * 9]  # each three bytes are one broken character
    pieces, _ = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens) == "\ufffd" * (size + 9)


@pytest.mark.parametrize("size", range(8, 24))
def test_a_character_behind_a_run_of_broken_bytes_is_whole(size):
    tokens = [*[0x80] * size, *"😀é".encode(), 0xF0, 0x9F, 0x98, *[0x80] * 9]
    pieces, _ = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens)


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([*b"xab"], ("b", "ab"), "x"),  # complete at the same letter: the longer one
        ([*b"xab", SPECIAL + 2], ("a", "t"), "x"),
        ([SPECIAL + 2], ("t", "ca"), " "),  # " cat" is one token: the one that is complete first
        ([SPECIAL + 2], ("cat", "a"), " c"),
    ],
)
def test_of_several_stop_strings_the_first_complete_one_counts(tokens, stop, expected):
    for order in (stop, stop[::-1]):
        pieces, text = stream(tokens, order)
        assert ("".join(pieces), text.is_stopped) == (expected, True)
        assert cut_at_first_stop(TOKENIZER.decode(tokens), order)[0] == expected


def test_text_before_a_possible_stop_string_is_shown_at_once():
    text = TextStream(TOKENIZER.decode, ("END",))
    assert [text.push(b) for b in b"xENEND!"] == ["x", "", "", "EN", "", "", ""]
    assert text.is_stopped
    assert text.finish() == ""


def test_a_held_suffix_is_shown_when_the_request_ends():
    text = TextStream(TOKENIZER.decode, ("END",))
    assert [text.push(b) for b in b"xEN"] == ["x", "", ""]
    assert text.finish() == "EN"


@pytest.mark.parametrize("unit", [list(b"ab "), [0x80], [SPECIAL], [0xF0, 0x9F], list("😀".encode())])
def test_the_cost_is_linear_in_the_length(unit):
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return TOKENIZER.decode(ids)

    text = TextStream(decode)
    for token in unit * 500:
        text.push(token)
    assert longest <= 24


def test_streaming_takes_microseconds_a_token():
    text = TextStream(TOKENIZER.decode, ("never",))
    start = time.perf_counter()
    for token in list(b"the cat sat ") * 200:
        text.push(token)
    assert (time.perf_counter() - start) / 2400 < 1e-3


@settings(max_examples=300, deadline=None)
@given(token_runs, stops, st.booleans(), st.integers(0, 6))
def test_pieces_that_are_known_already_are_those_of_the_decoder(tokens, stop, shows_special, unsearched):
    """And no token of whole characters is decoded twice."""
    decode, hidden = (TOKENIZER.decode_whole, None) if shows_special else (TOKENIZER.decode, TOKENIZER.hidden)
    known: dict[int, str] = {}
    for _ in range(2):
        plain, quick = (TextStream(decode, stop, hidden, pieces=each) for each in (None, known))
        for place, token in enumerate(tokens):
            assert quick.push(token, place >= unsearched) == plain.push(token, place >= unsearched)
            assert quick.stop == plain.stop
        assert quick.finish() == plain.finish()
    assert all(decode([token]) == text and text for token, text in known.items())


def test_only_a_decoder_of_bytes_has_pieces():
    assert OurTokenizer(build_encoder()).pieces == {False: {}, True: {}}
    words = Encoder(WordLevel({"a": 0}, "a"))
    assert OurTokenizer(words).pieces == {False: None, True: None}
    words.decoder = Sequence([ByteLevel(), Strip(" ", 1, 0)])
    assert OurTokenizer(words).pieces == {False: None, True: None}


def test_a_tokenizer_is_read_from_its_directory(tmp_path):
    assert OurTokenizer.load(tmp_path) is None
    build_encoder().save(str(tmp_path / "tokenizer.json"))
    plain = OurTokenizer.load(tmp_path)
    assert plain.encode("né") == list("né".encode())
    assert plain.decode([*"né".encode(), SPECIAL]) == "né"


def test_a_broken_tokenizer_is_a_config_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: expected a tokenizer"):
        OurTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("truncation", "padding"),
    [
        ({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}, None),
        ({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 9}, None),  # would panic
        (
            None,
            {
                "strategy": {"Fixed": 9},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        ),
    ],
)
def test_a_prompt_is_neither_cut_nor_filled_up(tmp_path, truncation, padding):
    values = json.loads(build_encoder().to_str()) | {"truncation": truncation, "padding": padding}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert OurTokenizer.load(tmp_path).encode("hello") == list(b"hello")


def test_a_prompt_that_cannot_be_encoded_is_a_request_error():
    with pytest.raises(RequestError, match="^the prompt cannot be encoded: .*surrogates not allowed"):
        TOKENIZER.encode("a\udcff")
    without_unk = OurTokenizer(Encoder(WordLevel({"a": 0}, unk_token="<unk>")))
    with pytest.raises(RequestError, match="^the prompt cannot be encoded: .*UNK"):
        without_unk.encode("b")


def test_a_tokenizer_on_which_the_library_panics_is_a_config_error(tmp_path):
    values = json.loads(build_encoder().to_str())
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: expected a tokenizer as .*") as caught:
        OurTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_an_error_and_an_interrupt_is_none():
    class Panic(BaseException):
        pass

    def encode(error):
        def fail(_):
            raise error

        return OurTokenizer(SimpleNamespace(encode_batch_fast=fail)).encode

    with pytest.raises(RequestError, match="^the prompt cannot be encoded: two lines$"):
        encode(Panic("two\nlines"))("a")
    with pytest.raises(KeyboardInterrupt):
        encode(KeyboardInterrupt())("a")


@pytest.mark.parametrize("spoil", ["directory", "nested", "link", "pointer"])
def test_a_tokenizer_that_cannot_be_read_is_not_taken_as_absent(tmp_path, spoil):
    path = tmp_path / "tokenizer.json"
    {
        "directory": path.mkdir,
        "nested": lambda: path.write_text("[" * 200_000),
        "link": lambda: path.symlink_to("no"),
        "pointer": lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    }[spoil]()
    expected = r"tokenizer\.json: .*git lfs pull" if spoil == "pointer" else r"tokenizer\.json"
    with pytest.raises(ConfigError, match=expected):
        OurTokenizer.load(tmp_path)


def test_text_without_a_tokenizer_is_a_request_error():
    with pytest.raises(RequestError, match=r"a text prompt needs a tokenizer.*no tokenizer\.json"):
        require_tokenizer(None, "a text prompt")
    assert require_tokenizer(TOKENIZER, "a text prompt") is TOKENIZER


def test_the_word_tokens_of_this_test_are_what_they_seem():
    assert TOKENIZER.decode([SPECIAL + 6, SPECIAL + 7]) == "😀"
