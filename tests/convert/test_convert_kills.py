"""A conversion that is killed leaves nothing that looks whole, and the same command then gives the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoints import small_config, small_tensors, write_small

from saccade.convert.changes import Mode
from saccade.convert.convert import convert

HELPERS = Path(__file__).parents[1] / "helpers" / "conversions"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 model in four shards, weights and scales mixed over them, with a tokenizer; and the same in BF16."""
    folder = tmp_path_factory.mktemp("sources")
    config = small_config()
    write_small(folder / "fp8", config, small_tensors(config), lambda name: sum(map(ord, name)) % 4, seed=1)
    (folder / "fp8" / "tokenizer.json").write_text('{"a": 1}')
    convert(folder / "fp8", folder / "plain", Mode("bf16"), threads=2)
    return folder


def kill(folder: Path, seed: int, points: int) -> list[dict]:
    path = os.pathsep.join([*sys.path])
    command = [sys.executable, str(HELPERS / "killed_conversions.py"), str(folder), str(seed), str(points)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def judge(lines: list[dict], points: int) -> None:
    assert len(lines) == points
    for line in lines:
        assert line["calls"] > 20, line
        for refused, whole in zip(line["refused"], line["whole"], strict=True):
            assert refused or whole, f"looks complete and is not: {line}"
        assert line["same"], f"not what an uninterrupted run writes: {line}"
    assert sum(any(line["killed"]) for line in lines) == points


def test_three_kills_change_nothing(sources: Path) -> None:
    judge(kill(sources, seed=0, points=3), 3)  # one of each conversion


@pytest.mark.soak
def test_fifty_kills_change_nothing(sources: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    lines = kill(sources, seed, points=50)
    print(f"seed {seed}", *map(json.dumps, lines), sep="\n")
    judge(lines, 50)
