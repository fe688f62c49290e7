"""What a step selects, on its way to the host: whole rows as one number, others in 16 bits where they fit; the device
memory that graphs share."""

import numpy as np
import pytest
import torch
from tiny_models import step_batch

from saccade.engine.steps import selections
from saccade.engine.steps.selections import (
    HeldParts,
    SeenRows,
    SelectionPlace,
    StepPiece,
    StepSelections,
    list_spans,
    widen_places,
)
from saccade.kernels.reference import select_all
from saccade.ops.step import Batch


def make_batch(pieces: list[tuple[int, int]], pages: int = 8) -> Batch:
    """Requests, each with its first position and its tokens."""
    table = torch.ones(len(pieces), pages, dtype=torch.int64)
    return step_batch([(i, [1] * size, start) for i, (start, size) in enumerate(pieces)], table)


def draw_rows(batch: Batch, width: int, layers: int, highest: int) -> list[torch.Tensor]:
    """i32 [T, width] of each layer, as an indexer gives them."""
    found = []
    for layer in range(layers):
        rows = select_all(batch.positions, width)
        for row, position in zip(rows, batch.positions.tolist(), strict=True):
            if position >= width:
                dice = torch.Generator().manual_seed(position + 1000 * layer)
                places = torch.randperm(min(position, highest), generator=dice)[: width - 1] + 1
                row[:] = torch.cat([places.new_zeros(1), places.sort().values])
        found.append(rows)
    return found


def run_through(batch: Batch, layers: list[torch.Tensor], place: SelectionPlace | None) -> StepSelections:
    capture = StepSelections(batch)
    if place is None:
        for layer in layers:
            capture.append(layer)
        return capture

    def step(found: StepSelections) -> None:
        for layer in layers:
            found.append(layer)

    capture.adopt(place.run(batch, step)[1])
    return capture


@pytest.mark.parametrize("pages", [1023, 1024])
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("way", ["eager", "first", "recorded"])
def test_rows_come_back_as_they_were_selected(pages: int, tokens: int, way: str) -> None:
    """Of two requests out of three: a prompt's begin, which is whole, its later rows, and a decode far behind."""
    sizes = [(0, tokens), (900, 2), (pages * 64 - 1, 1)]
    batch, width, place = make_batch(sizes, pages), 8, SelectionPlace(1024)
    layers = draw_rows(batch, width, 3, pages * 64)
    if way == "recorded":
        run_through(batch, layers, place)
    capture = run_through(batch, layers, None if way == "eager" else place)
    assert (capture.packed is not None) == (way == "recorded")
    capture.send([StepPiece(start, size, is_wanted=start != 900) for start, size in sizes])
    first, other, last = capture.read()
    assert first is not None and last is not None and other is None
    assert (first.whole, len(first.rows)) == (min(tokens, width), max(0, tokens - width)) and last.whole == 0
    assert last.rows.dtype == (np.uint16 if pages == 1023 else np.int32)
    expected = torch.stack(layers, 1).numpy()
    assert np.array_equal(widen_places(first.rows), expected[first.whole : tokens])
    assert np.array_equal(widen_places(last.rows), expected[-1:])
    held = HeldParts()
    held.append(first)
    assert np.array_equal(held.join(10_000).numpy(), expected[:tokens].swapaxes(0, 1))
    assert held.join(2).shape == (3, min(2, tokens), width)
    for begin, end in ((1, 2), (2, 10), (5, 20), (50, 60), (tokens - 1, 400), (400, 500)):
        assert np.array_equal(held.join(end, begin).numpy(), expected[:tokens].swapaxes(0, 1)[:, begin:end])


def test_rows_of_numbers_that_are_not_finite_are_empty() -> None:
    """Nothing is selected there, also below the width, where else everything is."""
    batch = make_batch([(2, 10)])
    layers = draw_rows(batch, 8, 2, 100)
    layers[1][3] = -1
    layers[0][9] = -1
    capture = run_through(batch, layers, None)
    capture.send([StepPiece(2, 10, is_wanted=True)])
    held = HeldParts()
    held.append(SeenRows(0, 2, np.zeros((0, 2, 8), np.uint16)))
    capture.note(0, held, 12)
    capture.hand_over()
    assert held.join(12)[:, 2:].equal(torch.stack(layers))


def test_what_is_handed_over_ends_with_what_counts_and_is_its_own() -> None:
    """Nothing of a refused draft; and the next step may use the same memory."""
    batch, place = make_batch([(6, 4), (20, 3)]), SelectionPlace(64)
    layers = draw_rows(batch, 8, 2, 100)
    run_through(batch, layers, place)
    capture = run_through(batch, layers, place)
    capture.send([StepPiece(6, 4, is_wanted=True), StepPiece(20, 3, is_wanted=True)])
    run_through(batch, [layer * 0 for layer in layers], place)
    parts = [HeldParts() for _ in range(3)]
    for piece, held, end in zip((0, 0, 1), parts, (9, 7, 21), strict=True):
        capture.note(piece, held, end)
    capture.hand_over()
    assert [(p.start, p.whole, len(p.rows)) for held in parts for p in held] == [(6, 2, 1), (6, 1, 0), (20, 0, 1)]
    assert np.array_equal(widen_places(parts[0][0].rows), torch.stack(layers, 1)[2:3].numpy())
    assert not np.shares_memory(parts[0][0].rows, capture._rows.numpy())


def test_a_large_part_is_copied_by_a_thread_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selections, "LARGE_PART", 64)
    rows, held = np.arange(96, dtype=np.uint16).reshape(4, 3, 8), HeldParts()
    for start in (0, 4):
        held.append(SeenRows(start, 0, rows + start))
        held.append(SeenRows(start + 2, 0, rows[2:3] + start))
    assert held.join(8)[:, ::4].tolist() == np.stack([rows[0], rows[0] + 4], 1).tolist()
    assert all(part.rows.base is None for part in held)
    only = HeldParts()
    only.append(SeenRows(0, 0, rows))
    found = only.join(4)
    assert found.numpy().tolist() == rows.swapaxes(0, 1).tolist() and not np.shares_memory(only[0].rows, rows)


def test_pieces_of_no_tokens_part_no_run() -> None:
    assert list(list_spans([2, 3, 4, 5], [False, True, True, False])) == [(2, 9)]
    assert list(list_spans([0, 3, 0, 4, 1], [False, True, False, True, False])) == [(0, 7)]


def test_all_recorded_steps_share_one_place_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selections, "PLACE_BYTES", 2 * 2 * 8 * 400)  # 400 tokens of two layers
    place = SelectionPlace(4096)
    found = []
    for size in (300, 300, 20, 400):
        batch = make_batch([(0, size)])
        assert place.has_room(batch)
        found.append(run_through(batch, draw_rows(batch, 8, 2, 100), place).packed)
    assert found[0] is None and len({x.data_ptr() for x in found[1:] if x is not None}) == 1
    assert not place.has_room(make_batch([(0, 401)]))
    larger = make_batch([(0, 201)], 1024)  # places of 32 bits
    assert place.has_room(make_batch([(0, 200)], 1024)) and not place.has_room(larger)
    assert len(run_through(larger, draw_rows(larger, 8, 2, 100), place)) == 2


def test_a_place_takes_what_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, it is asked for half; without any, steps that give selections are run as they are."""
    empty, asked, most = torch.empty, list[int](), 100

    def refuse(size: int, **how: object) -> torch.Tensor:
        if size:
            asked.append(size // 16)
        if size > 16 * most:
            raise torch.cuda.OutOfMemoryError("no memory")
        return empty(size, **how)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(selections.torch, "empty", refuse)
    batch = make_batch([(0, 70)])
    layers = draw_rows(batch, 8, 2, 100)
    place = SelectionPlace(300)
    for _ in range(2):
        place.run(batch, lambda found: [found.append(layer) for layer in layers])
    assert asked == [300, 150, 75] and place.has_room(batch) and not place.has_room(make_batch([(0, 76)]))
    asked.clear()
    most, place = 0, SelectionPlace(300)
    found = [place.run(batch, lambda found: [found.append(layer) for layer in layers])[1] for _ in range(2)]
    assert asked == [300, 150, 75] and not place.has_room(batch) and found[1].packed is None and len(found[1]) == 2
