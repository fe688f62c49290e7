"""How many threads compute, whose choice that is, and that waiting ones sleep."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import SPECIAL
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_dict, tiny_tensors

from saccade.api.llm import LLM
from saccade.api.settings import threads
from saccade.api.settings.threads import (
    choose_threads,
    find_threads,
    is_own,
    set_threads,
    sleeping_threads,
    typical_matrix,
)
from saccade.base.json_text import to_json
from saccade.checkpoint.open import bundled_path, open_model
from saccade.errors import ConfigError
from saccade.plan import make_plan


@pytest.fixture(autouse=True)
def threads_of_before(monkeypatch):
    monkeypatch.setattr(threads, "_chosen", None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "matrix", "cpus", "own", "expected"),
    [
        (None, 131_072, 64, None, 1),  # the bundled model
        (None, 2**20, 64, None, 1),
        (None, 2**22, 64, None, 4),
        (None, 2**22, 2, None, 2),  # no more than CPUs
        (None, 2**30, 1, None, 1),
        (None, 0, 8, None, 1),
        (None, 131_072, 2, 7, 7),  # the user's other choice stays
        (5, 131_072, 2, 7, 5),  # but for this one
        (5, 131_072, 2, None, 5),
    ],
)
def test_threads_are_as_many_as_the_matrices_pay_for(asked, matrix, cpus, own, expected):
    assert choose_threads(asked, matrix, cpus, own) == expected


@pytest.mark.parametrize("asked", [0, -1, True, 1.5, "2", 10**4, 10**400])
def test_a_senseless_number_of_threads_is_refused_by_name(asked):
    with pytest.raises(ConfigError, match="^threads: expected an integer of at least 1 and at most 1024, found "):
        choose_threads(asked, 1, 1)


def param(name, *shape):
    return SimpleNamespace(name=name, shape=shape)


def test_the_typical_matrix_is_the_one_that_half_of_the_numbers_are_in():
    big = [param("experts", 256, 4096, 7168), param("wk", 192, 7168), param("norm", 7168)]
    assert typical_matrix(SimpleNamespace(params=[*big, param("model.embed_tokens", 10**6, 7168)])) == 4096 * 7168
    assert typical_matrix(SimpleNamespace(params=[param("a", 10, 10), param("b", 8, 10)])) == 100
    assert typical_matrix(SimpleNamespace(params=[param("norm", 7168)])) == 1


def test_the_bundled_model_gets_one_thread(monkeypatch):
    plan = make_plan(*open_model(bundled_path()))
    monkeypatch.setattr(threads, "count_cpus", lambda: 64)
    monkeypatch.setattr(threads, "is_own", lambda *_: False)
    assert find_threads(64, None, plan, "cpu") == 1
    assert find_threads(64, None, plan, "cuda:1") == 64  # what a GPU's host does is left alone
    assert find_threads(64, 3, plan, "cuda") == 3


@pytest.mark.parametrize(
    ("found", "environment", "chosen", "expected"),
    [
        (8, {}, None, False),
        (4, {}, None, False),  # one a core
        (3, {}, None, True),  # torch.set_num_threads
        (8, {"OMP_NUM_THREADS": "8"}, None, True),
        (8, {"MKL_NUM_THREADS": "8"}, 8, True),
        (1, {}, 1, False),  # set here, for another model
        (8, {}, 1, True),  # and then by the user
    ],
)
def test_what_the_user_has_set_is_told_from_what_torch_begins_with(monkeypatch, found, environment, chosen, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_chosen", chosen)
    assert is_own(found, environment) is expected


def test_what_was_set_here_is_remembered():
    torch.set_num_threads(2)
    set_threads(torch, 2)
    assert threads._chosen is None
    set_threads(torch, 1)
    assert (torch.get_num_threads(), threads._chosen) == (1, 1)


def test_a_model_is_loaded_with_its_threads_and_its_bits_do_not_depend_on_them(tmp_path):
    values = tiny_dict(vocab_size=264, num_hidden_layers=2, max_position_embeddings=512, eos_token_id=SPECIAL)
    (tmp_path / "config.json").write_text(to_json(values))
    save_file(
        {n: t.contiguous() for n, t in tiny_tensors(tiny_config(**values)).items()}, tmp_path / "model.safetensors"
    )
    ids, scores = list(range(1, 200)), []
    for count in (1, 2, 3):
        llm = LLM(tmp_path, device="cpu", cache_tokens=512, threads=count)
        assert torch.get_num_threads() == llm.settings.threads == count
        scores.append(llm.score(ids))
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(ConfigError, match="^threads: "):
        LLM(tmp_path, device="cpu", threads=0)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("name", threads.WAITS)
def test_how_threads_wait_is_the_users_choice_first(monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv(name, "ACTIVE")
    before = dict(os.environ)
    with sleeping_threads():
        assert dict(os.environ) == before


def test_where_torch_is_loaded_nothing_changes():
    before = dict(os.environ)
    with sleeping_threads():
        assert dict(os.environ) == before


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp tells its settings; other systems have another library")
@pytest.mark.parametrize("code", ["from saccade import LLM", "from saccade import Completion"])
def test_waiting_threads_sleep_where_the_package_brings_torch(code):
    program = f"{code}\nimport os, torch; assert 'OMP_WAIT_POLICY' not in os.environ; torch.ones(9) + 1"
    environment = {k: v for k, v in os.environ.items() if k not in threads.WAITS} | {"OMP_DISPLAY_ENV": "TRUE"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in ran.stderr
