"""The plan of a folder, and the problems for which it is refused before a tensor byte is read."""

from pathlib import Path

import pytest

import saccade.weights.loader
from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import open_model
from saccade.config.file import read_config
from saccade.errors import PlanError, Problem
from saccade.models.registry import make_config
from saccade.plan import Plan, make_plan


def plan_of(root: Path) -> Plan:
    return make_plan(*open_model(root))


def problems_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    def read_nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor byte was read")

    monkeypatch.setattr(saccade.weights.loader, "read_rows", read_nothing)
    with pytest.raises(PlanError) as refusal:
        saccade.weights.loader.load(make_plan(make_config(*read_config(root)), read_index(root)))
    problems = refusal.value.problems
    for p in problems:  # the text that a person sees has every kind of problem in it
        assert p.kind and p.name and len(p.text.splitlines()) == 1
    return list(problems)
