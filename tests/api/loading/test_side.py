"""The files beside the weights: every end that one of them names, no model made unusable by them, every oddity told."""

import json
import re

import pytest
from byte_tokenizer import SPECIAL, build_encoder
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer

from saccade.api.loading.side_files import join_ends, read_side_files
from saccade.errors import RequestError
from saccade.text.tokenizer import Tokenizer as OurTokenizer
from saccade.text.tokenizer import still

TOOLS, USER = SPECIAL + 8, SPECIAL + 9
VOCAB = USER + 1


def write(root, encoder=None, **files):
    """`files` by name without .json; text as it is."""
    if encoder is None:
        encoder = build_encoder()
        encoder.add_special_tokens(["<|tools|>", "<|user|>"])
    encoder.save(str(root / "tokenizer.json"))
    for name, values in files.items():
        (root / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return root


@pytest.mark.parametrize(
    ("config", "files", "ends", "note"),
    [
        ((), {}, (), None),
        ((SPECIAL,), {}, (SPECIAL,), None),
        ((SPECIAL,), {"generation_config": {"eos_token_id": SPECIAL}}, (SPECIAL,), None),
        ((7,), {"generation_config": {"eos_token_id": [7, SPECIAL]}}, (7, SPECIAL), "config.json 7; generation_config.json 7, 256"),
        ((SPECIAL, USER), {"tokenizer_config": {"eos_token": "<eos>"}}, (SPECIAL, USER), None),  # as GLM's: one of several
        ((7,), {"tokenizer_config": {"eos_token": {"content": "<eos>"}}}, (7, SPECIAL), "tokenizer_config.json 256"),
        ((), {"tokenizer_config": {"eos_token": "<eos>"}}, (SPECIAL,), None),
        ((), {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<|user|>"}}, (USER,), None),
        ((), {"tokenizer_config": {"eos_token": "<eos>"}, "special_tokens_map": {"eos_token": "<|user|>"}}, (SPECIAL, USER), "special_tokens_map.json 265"),
        ((7,), {"tokenizer_config": {"extra_special_tokens": {"eot_token": "<|user|>"}}}, (7, USER), "265"),
        ((7,), {"tokenizer_config": {"eos_token": "</s>"}}, (7,), 'tokenizer_config.json: eos_token \'</s>\' is no token'),
        ((7,), {"tokenizer_config": {"eos_token": "\ud800"}}, (7,), "is no token"),
        ((7,), {"tokenizer_config": {"eos_token": 5}}, (7,), None),
        ((7,), {"generation_config": {"eos_token_id": [VOCAB, -1]}}, (7,), f"end token {VOCAB} is not in the vocabulary"),
        ((7,), {"generation_config": "["}, (7,), "generation_config.json: expected JSON"),
        # the tokenizer is broken, but its files still say which ids are ends
        ((7,), {"tokenizer": "{", "tokenizer_config": {"eos_token": "<x>", "added_tokens_decoder": {"9": {"content": "<x>"}}}}, (7, 9), "an answer ends at any of them"),
    ],
)  # fmt: skip
def test_an_answer_ends_at_every_end_that_a_file_names(tmp_path, config, files, ends, note):
    found = read_side_files(write(tmp_path, **files), config, VOCAB)
    assert found.defaults.eos_token_ids == ends
    assert all(text.isprintable() for text in found.notes)
    assert len(set(found.notes)) == len(found.notes)
    if note is None:
        assert found.notes == ()
    else:
        assert any(note in text for text in found.notes), found.notes


def test_the_ends_of_a_tokenizer_are_those_that_transformers_finds(tmp_path):
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|user|>"}}
    oracle = AutoTokenizer.from_pretrained(write(tmp_path, **files))
    assert read_side_files(tmp_path, (), VOCAB).defaults.eos_token_ids == (oracle.eos_token_id,) == (USER,)


def test_files_that_name_no_known_end_do_not_disagree():
    assert join_ends({"config.json": (), "tokenizer_config.json": (1,), "special_tokens_map.json": (1,)}, 9) == (
        (1,),
        (),
    )


BOS = {"add_bos_token": True}
PREFIX = [SPECIAL]


@pytest.mark.parametrize(
    ("files", "ids", "note"),
    [
        ({"tokenizer_config": BOS | {"bos_token": "<eos>"}}, PREFIX, None),
        ({"tokenizer_config": BOS | {"bos_token": {"content": "<eos>", "lstrip": False}}}, PREFIX, None),
        ({"tokenizer_config": {"add_bos_token": "true", "bos_token": "<eos>"}}, PREFIX, None),
        ({"tokenizer_config": BOS, "special_tokens_map": {"bos_token": "<eos>"}}, PREFIX, None),
        ({"tokenizer_config": BOS | {"bos_token": None}}, [], "bos_token is None: prompts get none"),
        ({"tokenizer_config": BOS}, [], "bos_token is None: prompts get none"),
        ({"tokenizer_config": {"bos_token": "<eos>"}}, [], None),
        ({"tokenizer_config": {"add_bos_token": False, "bos_token": "<s>"}}, [], None),
        ({"tokenizer_config": {"add_eos_token": True}}, [], "add_eos_token is not honoured"),
        ({"special_tokens_map": "{"}, [], "special_tokens_map.json: expected JSON"),
        ({"special_tokens_map": '{"bos_token": "a", "bos_token": "b"}'}, [], "stands twice"),
        ({"tokenizer_config": BOS | {"bos_token": "<s>"}}, None, "the tokenizer has no token '<s>' (bos_token of tokenizer_config.json)"),
        ({"tokenizer_config": "["}, None, "tokenizer_config.json: expected JSON"),
        ({"tokenizer_config": "[]"}, None, "tokenizer_config.json: expected a JSON object"),
    ],
)  # fmt: skip
def test_the_beginning_token_is_added_once_and_what_is_wrong_with_it_stops_only_text(tmp_path, files, ids, note):
    found = read_side_files(write(tmp_path, **files), (7,), VOCAB)
    assert found.defaults.eos_token_ids == (7,)
    assert found.tokenizer.decode([*b"n", SPECIAL]) == "n"  # answers to token ids have their text
    assert [text for text in found.notes if note is None or note not in text] == []
    assert bool(found.notes) == (note is not None)
    if ids is None:
        with pytest.raises(RequestError, match="^the prompt cannot be encoded: ") as caught:
            found.tokenizer.encode("n")
        assert note in str(caught.value)
    else:
        assert found.tokenizer.encode("n") == [*ids, ord("n")]
        assert found.tokenizer.encode("<eos>n") == [SPECIAL, ord("n")]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "[gMASK] <s> $A", "$A </s>"])
def test_what_is_put_around_a_prompt_is_not_put_there_twice(tmp_path, single):
    encoder = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    special = ["<s>", "</s>", "[gMASK]"]
    encoder.add_special_tokens(special)
    encoder.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(text, encoder.token_to_id(text)) for text in special]
    )
    tokenizer = read_side_files(write(tmp_path, encoder), (), 9).tokenizer
    front, back = (part.replace(" ", "") for part in single.split("$A"))
    plain = encoder.encode("ab").ids  # as transformers would have it
    assert tokenizer.encode("ab") == plain
    assert tokenizer.encode(front + "ab") == plain
    assert tokenizer.encode(front) == encoder.encode("").ids
    assert tokenizer.encode("ab<s>") == encoder.encode("ab<s>").ids


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", r"tokenizer\.json: expected a tokenizer"),
        ("[" * 200_000, r"tokenizer\.json: expected a tokenizer"),
        ('{"version": "2.0"}', "Unknown tokenizer version"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (None, r"^the checkpoint has no tokenizer\.json: use token ids$"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_a_note_and_says_why_there_is_no_text(tmp_path, text, reason):
    (tmp_path / "generation_config.json").write_text('{"stop_strings": ["END"]}')
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    found = read_side_files(tmp_path, (7,), VOCAB)
    assert found.tokenizer is None
    assert found.defaults.eos_token_ids == (7,) and found.defaults.stop == ()
    assert re.search(reason, found.obstacle)
    assert any("stop_strings ['END'] need a tokenizer" in note for note in found.notes)
    assert any(note.startswith("text is not served: ") for note in found.notes) == (text is not None)


def test_what_a_tokenizer_was_trained_with_is_switched_off_and_told(tmp_path):
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    vocab = {text: i for i, text in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd"])}
    encoder = Tokenizer(models.BPE(vocab, merges, dropout=0.5))
    encoder.enable_truncation(3)
    encoder.enable_padding(length=9)
    found = read_side_files(write(tmp_path, encoder), (), 9)
    assert {tuple(found.tokenizer.encode("abcdabcdabcd" * 2)) for _ in range(50)} == {(6,) * 6}
    assert found.notes == (
        "tokenizer.json: truncation to 3 tokens is switched off",
        "tokenizer.json: padding is switched off",
        "tokenizer.json: dropout 0.5 is switched off: it splits the same prompt at random",
    )


def test_sampling_of_a_unigram_tokenizer_is_switched_off():
    encoder = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)], unk_id=0))
    encoder.model.nbest_size, encoder.model.alpha = 64, 0.1
    drawn = {tuple(encoder.encode("ab" * 9).ids) for _ in range(50)}
    assert len(still(encoder)) == 2
    after = {tuple(OurTokenizer(encoder).encode("ab" * 9)) for _ in range(50)}
    assert len(after) == 1 < len(drawn)


def test_hidden_tokens_are_those_that_decoding_leaves_out():
    encoder = build_encoder()
    encoder.add_tokens([AddedToken("<think>", special=False), AddedToken("<|im_end|>", special=True)])
    assert OurTokenizer(encoder).hidden == {SPECIAL: "<eos>", SPECIAL + 9: "<|im_end|>"}
    assert OurTokenizer(encoder).decode([SPECIAL, SPECIAL + 8, SPECIAL + 9]) == "<think>"
