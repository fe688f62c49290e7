"""Sampling options refuse nonsense by name; generation_config.json fills what the user left open."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest

from saccade.errors import ConfigError, RequestError
from saccade.params import Defaults, SamplingParams


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


def test_a_single_stop_string_and_a_list_become_a_tuple():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_defaults_fill_only_what_the_user_left_open():
    defaults = Defaults(temperature=0.6, top_k=5, top_p=0.95)
    assert defaults.complete(SamplingParams(top_p=0.5, seed=3)) == SamplingParams(
        temperature=0.6, top_k=5, top_p=0.5, seed=3
    )
    mine = SamplingParams(temperature=0.0, top_k=0, top_p=1.0)
    assert defaults.complete(mine) == mine


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Defaults(eos_token_ids=(9,))),
        ({"eos_token_id": 1}, Defaults(eos_token_ids=(1,))),
        ({"eos_token_id": [1, 2]}, Defaults(eos_token_ids=(1, 2))),
        ({"eos_token_id": 0}, Defaults(eos_token_ids=(0,))),
        ({"do_sample": False, "temperature": 0.6}, Defaults(eos_token_ids=(9,))),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Defaults(0.6, 0, 0.9, (9,))),
        ({"do_sample": True, "top_k": 50}, Defaults(1.0, 50, 1.0, (9,))),
        ({"temperature": 0.6}, Defaults(0.6, 0, 1.0, (9,))),
    ],
)
def test_generation_config_is_read(tmp_path, values, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert Defaults.load(tmp_path, eos_token_ids=(9,)) == expected


def test_without_generation_config_sampling_is_greedy_and_eos_comes_from_config(tmp_path):
    assert Defaults.load(tmp_path, (7,)) == Defaults(0.0, 0, 1.0, (7,))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"repetition_penalty": 1.05, "do_sample": True, "min_p": 0.1}, "repetition_penalty=1.05, min_p=0.1"),
        ({"repetition_penalty": 1.05, "do_sample": False, "min_p": 0.1}, "repetition_penalty=1.05"),  # greedy: no min_p
        ({"num_beams": 4, "temperature": 0.6, "typical_p": 0.9}, "num_beams=4, typical_p=0.9"),
        ({"max_new_tokens": 99, "suppress_tokens": [3]}, "suppress_tokens=[3], max_new_tokens=99"),
    ],
)
def test_what_generation_config_asks_for_in_vain_is_named_in_one_note(values, named):
    assert Defaults.from_dict(values).notes == (f"generation_config.json: not supported and ignored: {named}",)


def test_neutral_values_of_what_is_not_supported_are_no_note():
    neutral = {"repetition_penalty": 1, "min_p": 0.0, "num_beams": 1, "typical_p": None, "suppress_tokens": []}
    assert Defaults.from_dict({"do_sample": True, "pad_token_id": 3, "use_cache": True, **neutral}).notes == ()


@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_do_sample_is_true_or_false(value):
    with pytest.raises(ConfigError, match="do_sample: expected true or false, found"):
        Defaults.from_dict({"do_sample": value, "temperature": 0.6})


@pytest.mark.parametrize("kind", ["directory", "link to nothing", "device or pipe"])
def test_a_generation_config_that_is_no_file_is_not_taken_as_absent(tmp_path, kind):
    path = tmp_path / "generation_config.json"
    {
        "directory": path.mkdir,
        "link to nothing": lambda: path.symlink_to("no"),
        "device or pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(ConfigError, match=f"generation_config.json: expected .*, found a {kind}"):
        Defaults.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"eos_token_id": "x"}', '{"do_sample": true, "top_p": 7}', "[" * 200_000,
        '{"temperature": 1' + "0" * 400 + "}", '{"top_k": 1' + "0" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_broken_generation_config_is_a_config_error(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config.json"):
        Defaults.load(tmp_path)
