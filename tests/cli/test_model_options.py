"""Options of a model that is loaded: each command that has one hands it on, under the name that LLM knows."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from saccade.api.loading import prepare
from saccade.cli.options import MODEL_OPTIONS
from saccade.errors import RequestError

# Argument of LLM: another value than the default.
ASKED: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "cache_tokens": 512, "max_batch_tokens": 64, "max_requests": 3,
    "max_mixed_tokens": 32, "launch_ahead": "on",
    "index_cache": "fp8", "latent_cache": "fp8", "activations": "bf16", "kernels": "reference", "speculate": "2",
    "mtp": False, "prefix_cache": False, "revision": "v1", "threads": 2, "tp": 2, "ep": 2, "check_ranks": True,
}  # fmt: skip
RANKS = ("tp", "ep", "check_ranks")
ARITHMETIC = ("index_cache", "latent_cache", "activations", "kernels")
PLACE = ("device", "dtype", "cache_tokens", "revision", "threads")
COMMANDS: dict[tuple[str, ...], set[str]] = {
    ("generate", "--prompt", "x"): set(ASKED)
    - {"max_batch_tokens", "max_mixed_tokens", "max_requests", "launch_ahead"},
    ("chat",): {*PLACE, *ARITHMETIC, "speculate", "mtp"},
    ("score", "--tokens", "1,2"): {*PLACE, *RANKS},
    ("eval",): {"device", "dtype", *ARITHMETIC, "revision", "threads", "tp", "ep"},
    ("look", "--prompt", "x"): {*PLACE, *ARITHMETIC},
    ("compare", "--server", "http://127.0.0.1:9"): set(PLACE),
    ("serve",): set(ASKED),
}


def spell(name: str, value: object) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", str(value)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_each_option_reaches_its_argument(
    run: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = dict[str, Any]()

    def refuse(path: object, *args: object, **options: object) -> None:
        given.update(inspect.signature(original).bind(path, *args, **options).arguments)
        raise RequestError("heard")

    original = prepare.prepare
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "prepare", refuse)
    monkeypatch.setattr("saccade.eval.evaluate.prepare", refuse)
    monkeypatch.setattr("saccade.server.run.run_server", lambda options, *others: refuse(**options))
    names = COMMANDS[command]
    ran = run(*command, *(word for name in names for word in spell(name, ASKED[name])))
    assert ran.code == 2 and ran.err.endswith("saccade: heard\n"), ran.err
    assert {name: given[name] for name in names} == {name: ASKED[name] for name in names}


def test_the_table_has_the_arguments_of_llm() -> None:
    others = {"path", "place", "tell"}
    assert set(inspect.signature(prepare.prepare).parameters) - others == set(MODEL_OPTIONS) == set(ASKED)


def test_what_is_not_given_is_the_default_of_llm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()

    def refuse(path: object, **options: Any) -> None:
        given.update(options)
        raise RequestError("heard")

    parameters = inspect.signature(prepare.prepare).parameters
    monkeypatch.setattr(prepare, "prepare", refuse)
    assert run("generate", "--prompt", "x").code == 2
    del given["tell"]
    assert given == {name: parameters[name].default for name in given} | {"speculate": "0"}
