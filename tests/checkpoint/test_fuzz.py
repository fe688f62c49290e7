"""Hostile headers and checkpoints: refused by name, or read as their bytes say; never a hang, never memory without end.

`make test` judges a fixed sample, `make soak` as many again as make a search; the outcomes of the last one are in
docs/soak.txt. A failing case names its number and the command that repeats it.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import fuzz_checkpoints
import fuzz_headers
import fuzzing
import pytest
import torch
from changed_checkpoints import mutate
from fuzzing import Failure, run_cases
from torch import Tensor

import saccade.weights.load_step
from saccade.checkpoint import header, index
from saccade.checkpoint.coding import Coding
from saccade.weights.dequantize import decode_rows

Judge = Callable[[int], str]

JUDGES: dict[str, Judge] = {"fuzz_headers": fuzz_headers.judge, "fuzz_checkpoints": fuzz_checkpoints.judge}
SAMPLE = {"fuzz_headers": 3_000, "fuzz_checkpoints": 120}
SOAK = {"fuzz_headers": 100_000, "fuzz_checkpoints": 5_000}  # further cases, not the same ones
PARTS = 4  # of the sample, so that processes share it


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", JUDGES)
def test_hostile_files_are_refused_by_name_or_read_as_their_bytes_say(name: str, part: int) -> None:
    step = SAMPLE[name] // PARTS + 1
    cases = range(part * step, min((part + 1) * step, SAMPLE[name]))
    outcomes = run_cases(name, JUDGES[name], cases)
    read = sum(n for kind, n in outcomes.items() if "refused" not in kind)
    assert 0.1 * len(cases) < read < 0.9 * len(cases), outcomes  # else one side was never tried
    assert len(outcomes) > 5, outcomes


@pytest.mark.soak
@pytest.mark.parametrize("name", JUDGES)
def test_a_long_search_finds_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = range(SAMPLE[name], SAMPLE[name] + SOAK[name])
    start = time.perf_counter()
    outcomes = run_cases(name, JUDGES[name], cases)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{name}: cases {cases.start:,} to {cases.stop - 1:,}, {len(cases):,} in {seconds:.0f} s, none failed")
        print("\n".join(f"{count:9,}  {kind}" for kind, count in outcomes.most_common()))
    assert sum(outcomes.values()) == len(cases)


def find_failure(name: str, cases: int) -> str:
    with pytest.raises(Failure) as found:
        run_cases(name, JUDGES[name], range(cases))
    return str(found.value)


def without_scale(coding: Coding, codes: Tensor, scales: Sequence[Tensor], *window: Any) -> Tensor:
    return decode_rows(coding, codes, [torch.ones_like(scale) for scale in scales], *window)


def keep_last(raw: bytes) -> tuple[object, list[str]]:
    return json.loads(raw), []


# Faults of the kind that engines had: what is broken, by which search it is found, and what the failure says.
FAULTS: dict[str, tuple[object, str, object, str, str]] = {
    "a scale is dropped": (saccade.weights.load_step, "decode_rows", without_scale, "fuzz_checkpoints", "not as the files have it"),
    "unknown tensors are skipped": (saccade.plan, "check_sources", lambda _: [], "fuzz_checkpoints", "without a word"),
    "a file may be cut short": (header, "check_tiling", lambda *_: [], "fuzz_headers", "the library refuses it"),
    "the last of two names wins": (header, "parse_json", keep_last, "fuzz_headers", "library"),
    "copies are not noticed": (index, "find_duplicates", lambda *_: iter(()), "fuzz_headers", "is taken from"),
    "index.json is not compared": (index, "compare_listing", lambda *_: [], "fuzz_headers", "is not taken from"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_finds_the_faults_that_engines_had(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, broken, name, words = FAULTS[fault]
    monkeypatch.setattr(module, attribute, broken)
    assert words in find_failure(name, 2_000 if name == "fuzz_headers" else 150)


def test_a_hang_ends_and_names_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    with pytest.raises(Failure, match="case 7 of x: TimeoutError.*repeat it with: python tests/helpers/fuzzing x 7"):
        run_cases("x", lambda case: time.sleep(0 if case < 7 else 60) or "slept", range(9))


def test_memory_without_end_is_a_failure() -> None:
    with pytest.raises(Failure, match="case 0 of x: RuntimeError.*allocate"):
        run_cases("x", lambda _: str(torch.empty(1 << 30, dtype=torch.uint8)), range(1))
    with pytest.raises(Failure, match="case 0 of x: MemoryError"):
        run_cases("x", lambda _: str(len(bytearray(1 << 30))), range(1))
    assert run_cases("x", lambda _: str(len(bytearray(1 << 20))), range(1)) == Counter({str(1 << 20): 1})


def test_a_case_is_the_same_every_time() -> None:
    for case in range(40):
        assert mutate(case) == mutate(case)
        assert fuzz_headers.judge(case) == fuzz_headers.judge(case)
