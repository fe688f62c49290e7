"""Batches in preallocated buffers: the padding rules, the buckets, the same addresses for the same shape."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import assemble, empty_cache, step_batch, tiny_config, tiny_tensors

from saccade.engine.buffers import Buffers, Run, round_small, round_to_bucket, widen
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference
from saccade.ops.step import Batch

FIELDS = [name for name in Batch.__dataclass_fields__ if name != "rounds"]  # tensors


def test_a_mixed_step_is_laid_out_as_the_fields_say():
    buffers = Buffers("cpu", max_tokens=16, max_requests=4, max_pages=4)
    batch = buffers.fill(
        [Run([5], 70, [3, 9], 1), Run([1, 2, 3, 4], 62, [7, 2], 0), Run([8, 9], 0, [4], 1), Run([6, 6], 3, [8], 2)]
    )
    assert batch.tokens.tolist() == [5, 1, 2, 3, 4, 8, 9, 6, 6, 0]
    assert batch.positions.tolist() == [70, 62, 63, 64, 65, 0, 1, 3, 4, 0]
    slots = [9 * 64 + 6, 7 * 64 + 62, 7 * 64 + 63, 2 * 64, 2 * 64 + 1, 4 * 64, 4 * 64 + 1, 8 * 64 + 3, 8 * 64 + 4, -1]
    assert batch.slots.tolist() == slots
    assert batch.request.tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 0]
    assert batch.page_table.tolist() == [[3, 9], [7, 2], [4, 0], [8, 0]]
    assert batch.seq_lens.tolist() == [71, 66, 2, 5]
    assert batch.query_start.tolist() == [0, 1, 5, 7, 9]
    assert batch.logit_rows.tolist() == [0, 6, 7, 8]
    assert batch.state_slots is None  # of a model without states


def test_padded_requests_are_empty_and_padded_tokens_go_nowhere():
    buffers = Buffers("cpu", max_tokens=64, max_requests=16, max_pages=16, has_states=True)
    buffers.fill([Run([7] * 6, 640, list(range(1, 12)), 6, slot=3)] * 10)  # something to be overwritten
    batch = buffers.fill([Run([5, 6], 640, list(range(1, 12)), 1, slot=2)] * 9)
    assert [len(getattr(batch, name)) for name in FIELDS] == [20, 20, 20, 20, 10, 10, 11, 10, 10]
    assert batch.page_table.shape == (10, 12)
    for name in ("tokens", "positions", "request"):
        assert getattr(batch, name)[18:].tolist() == [0, 0]
    assert batch.slots[18:].tolist() == [-1, -1]
    assert batch.page_table[9].tolist() == [0] * 12
    assert batch.page_table[:, 11].tolist() == [0] * 10
    assert batch.seq_lens[9] == 0
    assert batch.query_start[9:].tolist() == [18, 18]
    assert batch.logit_rows[9] == 0
    assert batch.state_slots is not None and batch.state_slots.tolist() == [2] * 9 + [0]


def test_pages_beyond_the_step_are_not_shown():
    batch = Buffers("cpu", 4, 4, 4).fill([Run([5], 0, [3, 9, 2], 1)])
    assert batch.page_table.tolist() == [[3]]


def test_the_same_shape_has_the_same_addresses():
    buffers = Buffers("cpu", 64, 8, 8, has_states=True)
    first = buffers.fill([Run([1], 5, [3], 1), Run([2], 9, [4], 1)])
    addresses = [getattr(first, name).data_ptr() for name in FIELDS]
    buffers.fill([Run([1] * 50, 0, [3], 0)])
    again = buffers.fill([Run([7], 6, [3], 1), Run([8], 10, [4], 1)])
    assert [getattr(again, name).data_ptr() for name in FIELDS] == addresses
    assert again.tokens.tolist() == [7, 8] and again is first and not again.rounds
    rounded = buffers.fill([Run([7], 6, [3], 1), Run([8], 10, [4], 1)], rounds=True)  # another step: see Recordings
    assert [getattr(rounded, name).data_ptr() for name in FIELDS] == addresses
    assert rounded is not again and rounded.rounds


@given(st.integers(1, 100_000))
def test_a_bucket_wastes_at_most_a_quarter_and_buckets_are_few(count):
    size = round_to_bucket(count)
    assert count <= size <= count * 1.25
    assert round_to_bucket(size) == size
    assert len({round_to_bucket(n) for n in range(1, 1 + 4096)}) == 8 + 4 * 9


def test_tables_of_small_steps_have_few_widths():
    pages = list(range(1, 5000))
    buffers = Buffers("cpu", max_tokens=64, max_requests=4, max_pages=300, small=16)
    widths = [buffers.fill([Run([7], n * 64 - 1, pages, 1)]).page_table.shape[1] for n in (1, 32, 33, 257, 300)]
    assert widths == [32, 32, 64, 320, 320]  # round_up(300) is the most
    assert buffers.fill([Run([7] * 17, 600, pages, 1)]).page_table.shape == (1, 10)
    assert Buffers("cpu", 64, 4, 300).fill([Run([7], 600, pages, 1)]).page_table.shape == (1, 10)
    assert len({widen(n, 2560) for n in range(1, 2561)}) == 8


def test_small_steps_have_few_sizes_and_find_room_for_their_padding():
    sizes = sorted({round_small(n) for n in range(257)})
    assert sizes == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(n <= round_small(n) < 2 * n for n in range(1, 257))
    buffers = Buffers("cpu", max_tokens=40, max_requests=36, max_pages=2, small=64)
    batch = buffers.fill([Run([5 + i], 70, [i + 1, i + 50], 1) for i in range(36)])
    assert len(batch.tokens) == len(batch.page_table) == len(batch.logit_rows) == 48
    assert batch.slots.tolist() == [(i + 50) * 64 + 6 for i in range(36)] + [-1] * 12


def test_a_wide_table_fits_into_the_smallest_buffers():
    buffers = Buffers("cpu", max_tokens=1, max_requests=1, max_pages=3, small=16)
    batch = buffers.fill([Run([5], 130, [7, 2, 9], 1)])
    assert (batch.page_table.tolist(), batch.slots.tolist(), batch.seq_lens.tolist()) == ([[7, 2, 9]], [578], [131])


def test_no_rows_and_one_row_are_buckets_of_their_own():
    assert [round_to_bucket(n) for n in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_decode_run_twice_through_the_same_buffers_is_right():
    config = tiny_config()
    model = Transformer(config, assemble(config, tiny_tensors(config)), Reference())
    torch.manual_seed(0)
    prompts = torch.randint(0, config.vocab_size, (2, 70)).tolist()
    table = torch.tensor([[2, 4], [3, 1]])
    expected_cache = empty_cache(config, step_batch([(0, [0], 0)], table))
    whole = step_batch([(0, prompts[0], 0), (1, prompts[1], 0)], table)
    expected = model.forward(whole, expected_cache).view(2, 70, -1)

    buffers, cache = Buffers("cpu", 140, 2, 2), empty_cache(config, whole)
    model.forward(buffers.fill([Run(p[:67], 0, table[i].tolist(), 0) for i, p in enumerate(prompts)]), cache)
    for step in (67, 68, 69):
        batch = buffers.fill([Run([p[step]], step, table[i].tolist(), 1) for i, p in enumerate(prompts)])
        hidden = model.forward(batch, cache)
        assert (hidden - expected[:, step]).abs().max() < 1e-4


def test_each_request_of_a_small_step_has_a_row_of_logits_where_any_is_wanted():
    buffers, wanted, inside = Buffers("cpu", 200, 32, 4, small=64), Run([7], 9, [1], 1), Run([7, 8], 0, [1], 0)
    assert len(buffers.fill([wanted] * 10 + [inside] * 6).logit_rows) == 16  # not 10: the shape of all that end here
    assert buffers.fill([wanted] * 2 + [inside] * 2).logit_rows.tolist() == [0, 1, 0, 0]
    assert len(buffers.fill([inside] * 16).logit_rows) == 0  # the head is not touched
    assert len(buffers.fill([wanted] * 10 + [Run([7] * 60, 0, [1], 0)]).logit_rows) == 10  # no small step
