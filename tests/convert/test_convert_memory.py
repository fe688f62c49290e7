"""The bound of memory that `convert` prints holds, also for odd shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saccade.checkpoint.index import Entry, File, Index
from saccade.checkpoint.read import RowRange
from saccade.convert import stream
from saccade.convert.changes import Output, OutputTensor

HELPERS = Path(__file__).parents[1] / "helpers" / "conversions"


def test_real_conversions_stay_below_the_bound(tmp_path: Path) -> None:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, str(HELPERS / "conversion_memory.py"), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["shape"] for line in told] == ["write_rows", "write_text"]
    for line in told:
        assert 0 < line["peak"] <= line["bound"], line
    assert told[0]["bound"] < 150 << 20  # and it is a bound, not a guess


@pytest.mark.parametrize("op", ["round", "dequantize", "quantize"])
def test_a_row_that_is_never_cut_is_in_the_bound(op: str) -> None:
    def bound(row: int) -> int:
        entry = Entry("a.weight", "F32", (1, row // 4), "f", 8, 8 + row)
        index = Index("", (File("f", 8 + row, 8, 1),), {entry.name: entry}, (), (), 0)
        item = OutputTensor(entry.name, "BF16", entry.shape, op, entry, None)
        return stream.memory_bound(index, [Output("f", b"", (item,), row, whole=False)], threads=3)

    assert bound(64 << 20) - bound(1 << 10) >= 3 * (64 << 20) * 40


def test_what_is_read_is_listed_in_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows once and in order, cut on the border of blocks, whatever the shapes."""
    monkeypatch.setattr(stream, "AT_ONCE", 10_000)
    shapes = {
        "tall": (1000, 30),
        "wide": (3, 9000),
        "small": (5, 7),
        "empty": (0, 4),
        "none": (4, 0),
        "one": (1, 99999),
    }
    entries = {n: Entry(n, "U8", s, "f", 0, s[0] * s[1]) for n, s in shapes.items()}
    index = Index("", (), entries, (), (), 0)
    runs = list(stream.split_blocks(index, [RowRange(n, 0, s[0]) for n, s in shapes.items()]))
    for name, shape in shapes.items():
        found = [r for run in runs for r in run if r.name == name]
        assert [row for r in found for row in range(r.first_row, r.last_row)] == list(range(shape[0]))
        assert all(r.first_row % 128 == 0 for r in found)
    sizes = [sum((r.last_row - r.first_row) * shapes[r.name][1] for r in run) for run in runs]
    assert all(size <= 10_000 or len(run) == 1 for size, run in zip(sizes, runs, strict=True)) and len(runs) > 5
