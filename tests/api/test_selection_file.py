"""Selections in a file are those in memory: with drafts, preemption, many requests; cut, full or foreign files are told."""

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import SelectionReader
from saccade.api.llm import LLM
from saccade.api.selection_file import KeptRequest, SelectionWriter, pack_rows, unpack_rows
from saccade.engine.params import SamplingParams
from saccade.engine.steps.selections import SeenRows, StepSelections
from saccade.errors import RequestError
from saccade.eval.tasks import draw_test

PROMPTS = [draw_test("recall", i, 160).prompt for i in range(3)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """With drafts, and pages for two of three requests: one is preempted."""
    yield LLM(speculate=2, cache_tokens=448, max_batch_tokens=100)


def test_a_file_holds_what_memory_would(llm: LLM, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    wanted = llm.generate(PROMPTS, params, capture_selection=True)
    before = llm.engine.scheduler.preemptions
    found = llm.generate(PROMPTS, params, capture_selection=tmp_path / "seen")
    assert llm.engine.scheduler.preemptions > before
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted] and found[0].selections is None
    reader = SelectionReader(tmp_path / "seen")
    assert reader.requests == [0, 1, 2] and reader.about["index_topk"] == 16
    for number, completion in enumerate(wanted):
        rows = reader.read(number)
        assert rows.dtype == np.int32 and completion.selections is not None
        assert np.array_equal(rows, torch.stack(completion.selections).numpy())
        assert reader.count_positions(number) == rows.shape[1]
    whole = (tmp_path / "seen").read_bytes()
    assert len(whole) < sum(s.numel() * 4 for c in wanted for s in c.selections or ()) / 2
    for cut in (len(whole) - 30, len(whole) // 2, whole.index(b"\n") + 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        part = SelectionReader(tmp_path / "cut")
        for number in part.requests:
            rows = part.read(number)
            full = reader.read(number)[:, : rows.shape[1], : rows.shape[2]]
            assert np.array_equal(rows[:, : full.shape[1]], full)


def test_what_is_in_a_file_is_not_in_memory(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the requests are still there, nothing holds their rows: neither they nor the steps, the queue, the thread."""
    parts, left, write, end = [], [], SelectionWriter.write, SelectionWriter.end

    def watched(self: SelectionWriter, request: int, part: SeenRows) -> None:
        parts.append(ref(part.rows))
        write(self, request, part)

    def ended(self: SelectionWriter, requests: Sequence[KeptRequest]) -> None:
        self._thread.shutdown()
        left.append(sum(rows() is not None for rows in parts))
        left.append(sum(type(found) is StepSelections for found in gc.get_objects()))
        end(self, requests)

    monkeypatch.setattr(SelectionWriter, "write", watched)
    monkeypatch.setattr(SelectionWriter, "end", ended)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    llm.generate(PROMPTS * 2, params, capture_selection=tmp_path / "seen")
    assert len(parts) >= 12 and left == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_come_back_as_they_were(data: st.DataObject) -> None:
    """Gaps of 254, 255, 256 and more; rows of everything, of one place, of none but the own."""
    start, tokens, layers = data.draw(st.sampled_from([0, 1, 254, 255, 70_000])), data.draw(st.integers(1, 4)), 2
    rows = []
    for _ in range(layers):
        for place in range(start, start + tokens):
            most = data.draw(st.sampled_from(["all", "few"])) == "all" and place < 300
            few = st.lists(st.integers(0, place) | st.sampled_from([0, place]), min_size=1, max_size=9, unique=True)
            rows.append(list(range(place + 1)) if most else sorted(data.draw(few)))
    width = max(map(len, rows)) + data.draw(st.integers(0, 2))
    part = np.array([row + [-1] * (width - len(row)) for row in rows], np.int32).reshape(layers, tokens, width)
    counts, gaps = pack_rows(part, start)
    assert [row.tolist() for row in unpack_rows(counts.astype("<u2"), gaps, start, tokens)] == rows


def test_what_is_wrong_with_a_file_is_one_line(llm: LLM, tmp_path: Path) -> None:
    for raw in (b"", b"{}\n", b'{"saccade_selections": 2}\n', b'{"saccade_selections', b"\x00" * 100):
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(RequestError, match="cannot be read as selections"):
            SelectionReader(tmp_path / "bad")
    with pytest.raises(RequestError, match="none cannot be read as selections: No such file"):
        SelectionReader(tmp_path / "none")
    with pytest.raises(RequestError, match="cannot be written: No such file"):
        llm.generate("a", capture_selection=tmp_path / "none" / "seen")
    for wrong in (1, None, b"seen", ["seen"]):
        with pytest.raises(RequestError, match="capture_selection: expected a path, True or False, found "):
            llm.generate("a", capture_selection=wrong)  # type: ignore[arg-type]
    (tmp_path / "kept").write_bytes(b"of yesterday")
    for name in ("new", "kept"):
        with pytest.raises(RequestError, match="token 99999"):
            llm.generate([[99999]], capture_selection=tmp_path / name)
    assert not (tmp_path / "new").exists() and (tmp_path / "kept").read_bytes() == b"of yesterday"
    llm.generate("a", SamplingParams(max_tokens=2), capture_selection=tmp_path / "kept")
    assert SelectionReader(tmp_path / "kept").requests == [0]
    if os.path.exists("/dev/full"):  # a disk without room: the answer was computed, and the file is told
        with pytest.raises(RequestError, match="/dev/full cannot be written: No space left"):
            llm.generate(PROMPTS[0], SamplingParams(max_tokens=3), capture_selection="/dev/full")
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].token_ids  # the engine goes on


def test_a_slow_disk_holds_up_the_steps_and_a_fault_of_the_thread_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be written has a bound. An error that is not the disk's is not swallowed."""
    monkeypatch.setattr("saccade.api.selection_file.MOST_WAITING", 100)
    waiting, write = [], SelectionWriter.write

    def watched(self: SelectionWriter, request: int, part: SeenRows) -> None:
        waiting.append(self._waiting)
        write(self, request, part)

    monkeypatch.setattr(SelectionWriter, "write", watched)
    rows = np.array([[[0, 1, 2, 3]]] * 4, np.uint16)  # 32 bytes
    with SelectionWriter(tmp_path / "seen", 1, 4) as writer:
        for i in range(20):
            writer.open_request(0).append(SeenRows(3 + 4 * i, 0, rows))
        writer.end([KeptRequest(80, [1] * 84)])
    assert len(waiting) == 20 and max(waiting) <= 100 and SelectionReader(tmp_path / "seen").read(0).shape == (1, 83, 4)
    monkeypatch.setattr(SelectionWriter, "write", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), SelectionWriter(tmp_path / "seen", 1, 4) as writer:
        writer.open_request(0).append(SeenRows(3, 0, rows))
        writer.end([KeptRequest(80, [1] * 84)])


def test_a_later_record_counts_and_guesses_behind_the_end_do_not(tmp_path: Path) -> None:
    with SelectionWriter(tmp_path / "seen", 1, 2) as writer:
        part = writer.open_request(0)
        part.append(SeenRows(0, 2, np.array([[[0, 2]]], np.int32)))  # [tokens, layers, K]
        part.append(SeenRows(2, 0, np.array([[[2, 65_535]], [[0, 3]]], np.uint16)))
        writer.end([KeptRequest(2, [7, 8, 9, 1151])])
    reader = SelectionReader(tmp_path / "seen")
    assert reader.read(0).tolist() == [[[0, -1], [0, 1], [2, -1]]] and reader.requests == [0]
    assert reader.read_tokens(0) == (2, [7, 8, 9, 1151])
    (tmp_path / "cut").write_bytes((tmp_path / "seen").read_bytes()[:-40])
    with pytest.raises(RequestError, match="cut was cut before the tokens of request 0"):
        SelectionReader(tmp_path / "cut").read_tokens(0)
