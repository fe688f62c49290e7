"""Columns that a step takes by slot are those that requests would write one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saccade.engine.sample import Row, draw_uniform, draw_uniforms, find_stream, list_columns
from saccade.engine.steps.slot_table import SlotTable

SEEDS = st.integers(-(2**70), 2**70)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**40)), max_size=9))
def test_random_numbers_of_many_streams_are_those_of_each(asked):
    streams = np.array([find_stream(seed) for seed, _ in asked], dtype=np.uint64)
    places = np.array([place for _, place in asked], dtype=np.int64)
    assert draw_uniforms(streams, places).tolist() == [draw_uniform(seed, place) for seed, place in asked]


OPTIONS = st.tuples(st.sampled_from([0.0, 0.7]), st.integers(0, 50), st.sampled_from([0.5, 1.0]), st.just(0.1))


@given(st.lists(st.tuples(OPTIONS, SEEDS), min_size=1, max_size=6), st.integers(0, 3))
def test_wants_of_slots_are_those_of_rows(asked, padding):
    table = SlotTable(8, 4)
    for slot, (options, seed) in enumerate(asked, 1):
        table.keep(slot, [slot], options, find_stream(seed))
    slots, length = list(range(len(asked), 0, -1)), len(asked) + padding
    found = table.list_wants(slots, [10 * slot for slot in slots], length)
    is_random = any(options[0] for options, _ in asked)
    rows = [Row(*asked[i - 1][0], draw_uniform(asked[i - 1][1], 10 * i) if is_random else 0.0) for i in slots]
    assert found.tolist() == list_columns(rows, length).tolist()


def test_a_slot_shows_the_pages_of_who_is_there_now():
    table = SlotTable(2, 4)
    table.keep(1, [5, 6, 7, 8, 9], (0.0, 0, 1.0, 0.0), 0)
    assert table.pages[1].tolist() == [5, 6, 7, 8]  # a table is no wider than a request is long
    table.keep(1, [3], (0.0, 0, 1.0, 0.0), 0)
    assert table.pages.tolist() == [[0] * 4, [3, 0, 0, 0], [0] * 4]


def test_a_slot_shows_the_options_of_who_is_there_now():
    table, fresh = SlotTable(1, 4), SlotTable(1, 4)
    table.keep(1, [5], (0.7, 40, 0.5, 0.1), find_stream(1))
    for each in (table, fresh):
        each.keep(1, [5], (0.9, 20, 1.0, 0.0), find_stream(2))
    assert table.list_wants([1], [3], 1).tolist() == fresh.list_wants([1], [3], 1).tolist()
