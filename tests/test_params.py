"""Sampling options refuse nonsense by name; generation_config.json fills what the user left open."""

import json

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
    ],
)
def test_a_senseless_option_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=rf"^{field}: expected .* found") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"do_sample": true, "top_p": 7}'])
def test_a_broken_generation_config_is_a_config_error(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config.json"):
        Defaults.load(tmp_path)
