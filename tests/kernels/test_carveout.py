"""Kernels that overlap ask for the same carveout; what it does on a GPU is in test_gpu.py."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from saccade.kernels import carveout


@pytest.mark.parametrize("about", [{"launch_pdl": True}, {"launch_pdl": False}, {}, None])
def test_only_kernels_that_overlap_are_asked_to_share(
    about: dict[str, bool] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, int, int]] = []

    class Driver:
        def __init__(self, name: str) -> None: ...

        def cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> int:
            asked.append((function.value, attribute, value.value))
            return 1  # an error: it is a hint

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    files = {"_other.json": str(tmp_path / "none.json")}
    if about is not None:
        (tmp_path / "_score.json").write_text(json.dumps(about))
        files["_score.json"] = str(tmp_path / "_score.json")
    carveout.set_carveout(None, 77, "_score", files, "digest")
    overlaps = bool(about and about.get("launch_pdl"))
    assert asked == [(77, carveout.ATTRIBUTE, carveout.PERCENT)] * overlaps


def test_a_machine_without_the_driver_or_the_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def miss(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", miss)
    (tmp_path / "k.json").write_text(json.dumps({"launch_pdl": True}))
    carveout.set_carveout(None, 1, "k", {"k.json": str(tmp_path / "k.json")})
    carveout.set_carveout(None, 1, "k", {"k.json": str(tmp_path / "gone.json")})
    (tmp_path / "half.json").write_text('{"launch_')
    carveout.set_carveout(None, 1, "k", {"k.json": str(tmp_path / "half.json")})
