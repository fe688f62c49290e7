"""Sampling options refuse nonsense by name; generation_config.json fills what the user left open."""

import json
import os
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.sample import Row, Spec, sample_rows
from saccade.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("seed", 0.5),
        ("stop", ("a", "")),
        ("stop", (1,)),
        ("ignore_eos", None),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", 2**63),
        ("max_tokens", 2**63),
        pytest.param("max_tokens", 10**5000, id="max_tokens without a repr"),
        pytest.param("temperature", 10**400, id="temperature that is no float"),
        ("top_p", Fraction(1, 10**400)),  # above 0, but no float
        ("stop", ("a" * 500, "")),
        ("n", 0),
        ("n", 129),
        ("n", None),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {1: None}),
        ("logit_bias", 5),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", None),
        ("include_stop_str_in_output", 1),
        ("skip_special_tokens", "no"),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 101),
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", 5),
        ("json_schema", {"a": float("nan")}),
        ("json_schema", {"a": object()}),
        pytest.param("json_schema", "[" * 100_000, id="json_schema too deep"),
        ("regex", ""),
        ("regex", 5),
        ("grammar", {}),
        pytest.param("grammar", "a" * 2_000_000, id="grammar too long"),
    ],
)
def test_a_senseless_option_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=rf"^{field}: expected .* found") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_numbers_of_numpy_become_plain_ones():
    found = SamplingParams(
        np.uint8(200), np.float32(0.5), np.int8(100), np.float64(0.25), np.int64(5), logprobs=np.uint8(3)
    )
    for name, value in dict(max_tokens=200, temperature=0.5, top_k=100, top_p=0.25, seed=5, logprobs=3).items():
        assert getattr(found, name) == value
        assert type(getattr(found, name)) is type(value)


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(RequestError, match=r"^min_tokens: expected at most max_tokens=3, found 4$"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(
        RequestError, match=r"^regex and grammar: expected at most one of json_schema, regex, grammar, structural_tag$"
    ):
        SamplingParams(regex="a", grammar="b")


def test_what_is_given_in_several_shapes_is_kept_in_one():
    """And that is taken again: params are changed by `replace`."""
    found = SamplingParams(
        logit_bias={"7": 1, np.int64(3): np.float32(-2)}, stop_token_ids=[np.int32(4)], json_schema={"b": 1, "a": "é"}
    )
    assert found.logit_bias == ((3, -2.0), (7, 1.0)) and found.stop_token_ids == (4,)
    assert found.json_schema == '{"b": 1, "a": "é"}'
    assert replace(found, max_tokens=3) == replace(found, max_tokens=np.int8(3)) and hash(found)


def test_n_answers_have_seeds_in_a_row():
    assert [one.seed for one in SamplingParams(n=3, seed=5).each()] == [5, 6, 7]
    assert SamplingParams(n=2, top_k=3).each() == [SamplingParams(top_k=3)] * 2


def test_a_single_stop_string_and_a_list_become_a_tuple():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_defaults_fill_only_what_the_user_left_open():
    defaults = Defaults(temperature=0.6, top_k=5, top_p=0.95)
    plain = SamplingParams(min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
    assert defaults.complete(SamplingParams(top_p=0.5, seed=3)) == replace(
        plain, temperature=0.6, top_k=5, top_p=0.5, seed=3
    )
    mine = replace(plain, temperature=0.0, top_k=0, top_p=1.0)
    assert defaults.complete(mine) == mine


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Defaults()),
        ({"eos_token_id": 1}, Defaults(eos_token_ids=(1,))),
        ({"eos_token_id": [1, 2]}, Defaults(eos_token_ids=(1, 2))),
        ({"eos_token_id": 0}, Defaults(eos_token_ids=(0,))),
        ({"do_sample": False, "temperature": 0.6}, Defaults()),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Defaults(0.6, 0, 0.9)),
        ({"do_sample": True, "top_k": 50}, Defaults(1.0, 50, 1.0)),
        ({"temperature": 0.6}, Defaults(0.6, 0, 1.0)),
        ({"temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}, Defaults()),
        ({"repetition_penalty": 1.05, "presence_penalty": 1}, Defaults(repetition_penalty=1.05, presence_penalty=1.0)),
        ({"do_sample": True, "min_p": 0.1, "frequency_penalty": -1}, Defaults(1.0, min_p=0.1, frequency_penalty=-1.0)),
        ({"do_sample": False, "min_p": 0.1}, Defaults()),
        ({"stop_strings": "END"}, Defaults(stop=("END",))),
        ({"stop_strings": ["a", "b", "a"]}, Defaults(stop=("a", "b"))),
    ],
)
def test_generation_config_is_read(tmp_path, values, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert Defaults.load(tmp_path) == expected


def test_without_generation_config_sampling_is_greedy(tmp_path):
    assert Defaults.load(tmp_path) == Defaults(0.0, 0, 1.0)


SAMPLED = {"do_sample": True}


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        (SAMPLED | {"top_k": -1}, Defaults(1.0), "top_k=-1 is taken as 0: no limit"),
        ({"top_k": -1}, Defaults(), "top_k=-1 is taken as 0: no limit"),
        (SAMPLED | {"top_k": 50.0}, Defaults(1.0, 50), "top_k=50.0 is taken as 50"),
        (SAMPLED | {"top_k": "50"}, Defaults(1.0, 50), "top_k='50' is taken as 50"),
        (SAMPLED | {"top_k": 0.5}, Defaults(1.0), "top_k=0.5 makes no sense and is ignored"),
        (SAMPLED | {"top_k": -7}, Defaults(1.0), "top_k=-7 makes no sense and is ignored"),
        (SAMPLED | {"top_k": True}, Defaults(1.0), "top_k=True makes no sense and is ignored"),
        (SAMPLED | {"top_k": 10**400}, Defaults(1.0), "top_k=1000"),
        (SAMPLED | {"top_p": 0}, Defaults(1.0, 1), "top_p=0 is taken as top_k=1: the likeliest token alone"),
        (SAMPLED | {"top_p": 0.0, "top_k": 9}, Defaults(1.0, 1), "top_p=0.0 is taken as top_k=1"),
        (SAMPLED | {"top_p": "0.9"}, Defaults(1.0, 0, 0.9), "top_p='0.9' is taken as 0.9"),
        (SAMPLED | {"top_p": 7}, Defaults(1.0), "top_p=7 makes no sense and is ignored"),
        (SAMPLED | {"top_p": -1}, Defaults(1.0), "top_p=-1 makes no sense and is ignored"),
        (SAMPLED | {"min_p": 2}, Defaults(1.0), "min_p=2 makes no sense and is ignored"),
        ({"repetition_penalty": 0}, Defaults(), "repetition_penalty=0 makes no sense and is ignored"),
        (SAMPLED | {"temperature": -1}, Defaults(1.0), "temperature=-1 makes no sense and is ignored"),
        (SAMPLED | {"temperature": float("inf")}, Defaults(1.0), "temperature=inf makes no sense"),
        (SAMPLED | {"temperature": float("nan")}, Defaults(1.0), "temperature=nan makes no sense"),
        (SAMPLED | {"temperature": 10**400}, Defaults(1.0), "temperature=1000"),
        (SAMPLED | {"temperature": [0.6]}, Defaults(1.0), "temperature=[0.6] makes no sense"),
        ({"temperature": "hot"}, Defaults(), "temperature='hot' makes no sense"),
        ({"do_sample": 1, "temperature": 0.5}, Defaults(0.5), "do_sample=1 is taken as true"),
        ({"do_sample": "False", "temperature": 0.5}, Defaults(), "do_sample='False' is taken as false"),
        ({"do_sample": [], "temperature": 0.5}, Defaults(0.5), "do_sample=[] is ignored"),
        ({"eos_token_id": -1}, Defaults(), "eos_token_id: -1 is no token id and is ignored"),
        ({"eos_token_id": [1, -1, 1]}, Defaults(eos_token_ids=(1,)), "eos_token_id: -1 is no token id"),
        ({"eos_token_id": [7.0, True]}, Defaults(eos_token_ids=(7,)), "eos_token_id: 7.0 is taken as 7"),
        ({"eos_token_id": "7"}, Defaults(eos_token_ids=(7,)), 'eos_token_id: "7" is taken as 7'),
        ({"eos_token_id": {"a": 1}}, Defaults(), "eos_token_id: an object of 1 keys is no token id"),
        ({"eos_token_id": "\x1b[31m\ud800"}, Defaults(), r'eos_token_id: "\x1b[31m\ud800" is no token id'),
        ({"stop_strings": ["a", "", 3]}, Defaults(stop=("a",)), "stop_strings: '' is no stop string and is ignored"),
    ],
)  # fmt: skip
def test_what_other_conventions_write_has_its_meaning_there_and_a_note(values, expected, note):
    found = Defaults.from_dict(values)
    assert replace(found, notes=()) == expected
    assert found.notes[0].startswith(f"generation_config.json: {note}")
    assert all(text.isprintable() and len(text) < 200 for text in found.notes)
    found.complete(SamplingParams())  # refuses senseless values: whatever a file says, a request can be made


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 1.0])
def test_top_p_of_a_file_keeps_the_tokens_that_transformers_keeps(top_p):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = Defaults.from_dict(SAMPLED | {"top_p": top_p})
    row = Row(found.temperature, found.top_k, found.top_p)
    drawn = {choose(logits, row, (i + 0.5) / 200) for i in range(200)}
    assert len(drawn) == int(TopPLogitsWarper(top_p)(None, logits).isfinite().sum())


def choose(logits, row, uniform):
    spec = Spec.build([row._replace(uniform=uniform)], 1, -1, "cpu")
    return sample_rows(lambda hidden: logits, logits, torch.zeros(1, dtype=torch.long), spec).read()[0].token


def test_stop_strings_of_a_file_are_added_to_those_of_a_request():
    defaults = Defaults(stop=("END",))
    assert defaults.complete(SamplingParams(stop="a")).stop == ("a", "END")
    assert defaults.complete(SamplingParams(stop="a", ignore_eos=True)).stop == ("a",)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"no_repeat_ngram_size": 3, "do_sample": True, "top_h": 0.1}, "no_repeat_ngram_size=3, top_h=0.1"),
        ({"no_repeat_ngram_size": 3, "do_sample": False, "top_h": 0.1}, "no_repeat_ngram_size=3"),  # greedy: no top_h
        ({"num_beams": 4, "temperature": 0.6, "typical_p": 0.9}, "num_beams=4, typical_p=0.9"),
        ({"max_new_tokens": 99, "suppress_tokens": [3]}, "suppress_tokens=[3], max_new_tokens=99"),
    ],
)
def test_what_generation_config_asks_for_in_vain_is_named_in_one_note(values, named):
    assert Defaults.from_dict(values).notes == (f"generation_config.json: not supported and ignored: {named}",)


def test_neutral_values_of_what_is_not_supported_are_no_note():
    neutral = {"repetition_penalty": 1, "min_p": 0.0, "num_beams": 1, "typical_p": None, "suppress_tokens": []}
    assert Defaults.from_dict({"do_sample": True, "pad_token_id": 3, "use_cache": True, **neutral}).notes == ()


@pytest.mark.parametrize("kind", ["directory", "link to nothing", "device or pipe"])
def test_a_generation_config_that_is_no_file_is_a_note(tmp_path, kind):
    path = tmp_path / "generation_config.json"
    {
        "directory": path.mkdir,
        "link to nothing": lambda: path.symlink_to("no"),
        "device or pipe": lambda: os.mkfifo(path),
    }[kind]()
    found = Defaults.load(tmp_path)
    assert re.search(f"generation_config.json: expected .*, found a {kind}; the file is not used$", found.notes[0])
    assert replace(found, notes=()) == Defaults()


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, '{"top_k": 1' + "0" * 5000 + "}", "\ufeffx", ""])
def test_a_generation_config_that_cannot_be_read_is_a_note(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    found = Defaults.load(tmp_path)
    assert len(found.notes) == 1 and "generation_config.json: expected " in found.notes[0]
    assert replace(found, notes=()) == Defaults()


def test_what_editors_and_other_writers_leave_in_a_side_file_is_read_and_odd_numbers_are_told(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('\ufeff{"top_k": 7, "do_sample": true}', encoding="utf-8")
    assert Defaults.load(tmp_path) == Defaults(temperature=1.0, top_k=7)
    path.write_text('{"top_k": 7, "do_sample": true, "max_time": NaN, "x": [-Infinity]}')
    found = Defaults.load(tmp_path)
    assert found.top_k == 7 and found.notes == (
        "generation_config.json: NaN, -Infinity: no JSON number; other readers may refuse the file",
    )
    path.write_text('{"a": ' * 200 + "1" + "}" * 200)
    assert "nested more than 128 deep" in Defaults.load(tmp_path).notes[0]
    path.write_bytes('{"top_k": 7}'.encode("utf-16"))
    assert "it is UTF-16, expected UTF-8; the file is not used" in Defaults.load(tmp_path).notes[0]


def test_a_key_that_stands_twice_in_a_side_file_is_a_note_and_the_last_counts(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1, "a": {"b": 1, "b": 2}, "eos_token_id": 2}')
    found = Defaults.load(tmp_path)
    assert found.eos_token_ids == (2,)
    assert found.notes == ("generation_config.json: 'b, eos_token_id' stands twice; the last counts",)
