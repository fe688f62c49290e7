"""Kernels of the indexer and of sparse attention against reference.py: in the interpreter, or on a GPU."""

import pytest
import torch
from paged_steps import DEVICE, Step

from saccade.kernels import reference
from saccade.kernels.attention import dense
from saccade.kernels.attention import sparse_decode as attend
from saccade.kernels.attention.dense import dense_attention
from saccade.kernels.attention.sparse_decode import AttendConfig, attend_values, sparse_attention
from saccade.kernels.attention.sparse_prefill import (
    ManyConfig,
    attend_in_parts,
    choose_splits,
    is_taken,
    sparse_attention_of_many,
)
from saccade.kernels.indexer.logits import ScoreConfig, index_logits
from saccade.kernels.indexer.select import SelectConfig, absorb, select, select_and_absorb
from saccade.kernels.linear.head_gemm import multiply_heads


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN: what is read must have been written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


STEPS = [([70, 130, 5], [1, 1, 1]), ([90, 130, 20], [7, 8, 5])]


@pytest.mark.parametrize("lengths, tokens", STEPS)
@pytest.mark.parametrize("style", ["rotated", "halves", "interleaved"])
def test_scores_of_keys_in_pages(lengths, tokens, style):
    step = Step(lengths, tokens, 3)
    q, keys = step.normal(step.count, 4, 128), step.normal(step.pages * 64, 128, dtype=torch.bfloat16)
    weights = step.normal(step.count, 10)[:, 6:]
    rotation = step.rotation(64)
    turned = torch.cat([reference.rotate(q[..., :64], rotation, style == "interleaved"), q[..., 64:]], 2)
    given = (turned, None) if style == "rotated" else (q, rotation)
    right = reference.index_logits(turned, weights * 0.5, keys, *step.where())
    found = index_logits(given[0], weights, keys, *step.where(), given[1], style == "interleaved", 0.5)
    assert (found.isinf() == right.isinf()).all()
    torch.testing.assert_close(found, right, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("options", [{"tile": 128, "chunk": 128}, {"tokens": 4, "chunk": 192}, {"chunk": 64}])
def test_scores_do_not_depend_on_how_the_work_is_dealt(options):
    step = Step([90, 170, 20, 300], [2, 3, 2, 2], 6)
    q, keys = step.normal(step.count, 4, 128), step.normal(step.pages * 64, 128, dtype=torch.bfloat16)
    weights = step.normal(step.count, 4)
    torch.testing.assert_close(
        index_logits(q, weights, keys, *step.where(), config=ScoreConfig(**options)),
        reference.index_logits(q, weights, keys, *step.where()),
        atol=2e-3,
        rtol=1e-5,
    )


def test_scores_of_float32_keys_are_exact_to_float32():
    step = Step([70, 130], [2, 9], 3)
    q, keys = step.normal(step.count, 4, 48), step.normal(step.pages * 64, 48)
    weights = step.normal(step.count, 4)
    right = reference.index_logits(q, weights, keys, *step.where())
    torch.testing.assert_close(index_logits(q, weights, keys, *step.where()), right, atol=2e-5, rtol=2e-5)


def test_scores_of_fp8_keys_take_the_scale_of_each_row():
    step = Step([70, 130], [2, 9], 3)
    q = step.normal(step.count, 4, 128, dtype=torch.float8_e4m3fn)
    keys = step.normal(step.pages * 64, 128, dtype=torch.float8_e4m3fn)
    scales = step.normal(step.pages * 64).abs()
    weights = step.normal(step.count, 4)
    right = reference.index_logits(q.float(), weights, keys.float() * scales[:, None], *step.where())
    found = index_logits(q.bfloat16(), weights, keys, *step.where(), key_scales=scales)
    torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-4)


# Selection.


def logits_of(kind, random, t, s):
    x = torch.randn(t, s, generator=random)
    return {
        "normal": x,
        "steps": (x * 4).round() / 4,
        "zeros": (x - 1.5).relu() * torch.randn(t, s, generator=random).sign(),
        "equal": torch.full_like(x, 0.75),
        "wide": (x * 20).exp() * x.sign(),  # up to 1e34
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "steps", "zeros", "equal", "wide"])
@pytest.mark.parametrize("size, k, block", [(192, 16, 16384), (320, 30, 64), (64, 200, 16384)])
def test_the_best_logits_are_selected_exactly(kind, size, k, block):
    random = torch.Generator().manual_seed(size)
    positions = torch.tensor([size - 1, 0, k - 1, k]).clamp(max=size - 1)
    logits = logits_of(kind, random, len(positions), size)
    hidden = torch.arange(size) > positions[:, None]
    right = reference.select(logits.masked_fill(hidden, float("-inf")), positions, k)
    given = logits.masked_fill(hidden, 1e9)  # what lies behind a token's position is not read
    found = select(given.to(DEVICE), positions.to(DEVICE), k, SelectConfig(block=block))
    assert found.dtype == torch.int32 and torch.equal(found.cpu(), right)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000, 0x7F800000], ids=hex)  # NaN, infinity
@pytest.mark.parametrize("block", [16384, 64])
def test_a_logit_that_is_not_finite_selects_nothing_and_harms_nobody(bits, block):
    """The first of these is the greatest integer, too."""
    logits = torch.randn(3, 192, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([191, 191, 16])
    right = reference.select(logits.where(torch.arange(192) <= positions[:, None], -torch.inf), positions, 16)
    logits[1, 17] = logits[2, 17] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # the last is not seen
    right[1] = -1
    assert torch.equal(reference.select(logits[:2], positions[:2], 16), right[:2])
    assert torch.equal(select(logits.to(DEVICE), positions.to(DEVICE), 16, SelectConfig(block=block)).cpu(), right)


def test_scores_of_keys_that_are_no_numbers_are_none():
    step = Step([70, 130, 5], [3, 1, 1], 3)
    q, keys = step.normal(step.count, 4, 128), step.normal(step.pages * 64, 128, dtype=torch.bfloat16)
    weights = step.normal(step.count, 4)
    keys[reference.find_slots(*step.where()[:2], torch.full((step.count, 1), 2, device=DEVICE))[0, 0], 5] = torch.nan
    found, right = (ops(q, weights, keys, *step.where()) for ops in (index_logits, reference.index_logits))
    assert torch.equal(found.isnan(), right.isnan()) and found.isnan().sum() == 3


@pytest.mark.parametrize("coded", [False, True])
def test_attention_over_nothing_is_no_number_and_what_is_not_selected_is_not_seen(coded):
    step = Step([90, 20, 70], [14, 3, 4], 2)
    q, pool = step.normal(step.count, 4, 96), step.latents(64, 32, coded=coded)
    chosen, where = selection_of(step, 40), (step.page_table, step.request)
    seen = torch.zeros(len(pool.data), dtype=torch.bool, device=DEVICE)
    seen[reference.find_slots(*where, chosen.long().clamp(min=0))] = True
    chosen[4] = chosen[-1] = -1
    given = spoil(pool, ~seen)  # other rows of the pages, and other requests' pages
    right = reference.sparse_attention(q, pool, *where, chosen, 0.08, 64)
    assert right.isnan().flatten(1).all(1).nonzero().flatten().tolist() == [4, step.count - 1]
    for ops, how in (
        (sparse_attention, {"config": AttendConfig(splits=1)}),
        (sparse_attention, {"config": AttendConfig(splits=3)}),
        (sparse_attention_of_many, {}),
        (sparse_attention_of_many, {"config": ManyConfig(splits=3, tile=16)}),
    ):
        found = ops(q, given, *where, chosen, 0.08, 64, **how)
        torch.testing.assert_close(found, right, **close_to(pool.numbers), equal_nan=True)
    w_uv = step.normal(4, 20, 64).bfloat16()
    values = attend_values(q, given, *where, chosen, 0.08, w_uv)
    assert torch.equal(values.isnan().all(1), right.isnan().flatten(1).all(1))
    wanted = torch.einsum("thc,hvc->thv", right, w_uv.float())
    for how in (ManyConfig(splits=1), ManyConfig(splits=3, tile=16)):  # some parts have no rows
        found = multiply_heads(attend_in_parts(q, given, *where, chosen, 0.08, 64, how), w_uv.transpose(1, 2))
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3, equal_nan=True)


def test_a_request_whose_rows_are_no_numbers_spoils_no_other_beside_it():
    step = Step([70, 5, 40], [3, 1, 5], 2)  # a program takes two tokens: of one request, or of two
    q, pool = step.normal(step.count, 16, 96), step.latents(64, 32)
    right = dense_attention(q, pool, *step.where(), 0.08, 64)
    for spoiled in range(3):
        rows = torch.zeros(step.pages, 64, dtype=torch.bool, device=DEVICE)
        rows[step.page_table[spoiled]] = True
        given = spoil(pool, rows.flatten())
        found = dense_attention(q, given, *step.where(), 0.08, 64)
        assert found[step.request == spoiled].isnan().all()
        assert torch.equal(found[step.request != spoiled], right[step.request != spoiled])


def absorbed_queries(q, w_uk, rotation):
    nope = w_uk.shape[1]
    taken = torch.einsum("thn,hnc->thc", q[..., :nope].double(), w_uk.double()).float()
    return torch.cat([taken, reference.rotate(q[..., nope:], rotation, True)], 2)


@pytest.mark.parametrize("heads, nope, lora, rope", [(4, 64, 256, 64), (3, 48, 80, 16), (3, 48, 80, 0)])
def test_queries_are_absorbed_beside_the_selection(heads, nope, lora, rope):
    step = Step([70, 130], [1, 2], 3)
    q, rotation = step.normal(step.count, heads, nope + rope), step.rotation(rope)
    w_uk = step.normal(heads, nope, lora, dtype=torch.bfloat16)
    logits = step.normal(step.count, 192)
    right = absorbed_queries(q, w_uk, rotation)
    torch.testing.assert_close(absorb(q, w_uk, rotation), right, atol=1e-4, rtol=1e-5)
    visible = logits.masked_fill(torch.arange(192, device=DEVICE) > step.positions[:, None], float("-inf"))
    for block in (256, 64):  # one pass, and three chunks before the last
        selection, absorbed = select_and_absorb(
            logits, step.positions, 16, q, w_uk, rotation, SelectConfig(block=block)
        )
        torch.testing.assert_close(absorbed, right, atol=1e-4, rtol=1e-5)
        assert torch.equal(selection, reference.select(visible, step.positions, 16))


# Attention.


def selection_of(step, k):
    context = step.pages // step.page_table.shape[0] * 64
    logits = step.normal(step.count, context)
    hidden = torch.arange(context, device=step.device) > step.positions[:, None]
    return reference.select(logits.masked_fill(hidden, float("-inf")), step.positions, k)


def spoil(pool, rows):
    """The pool, with these rows no numbers."""
    if pool.scales is None:
        return pool._replace(data=pool.data.masked_fill(rows[:, None], torch.nan))
    return pool._replace(scales=pool.scales.masked_fill(rows, torch.nan))


SHAPES = [(4, 256, 64), (8, 64, 16), (3, 48, 32), (4, 64, 0)]  # the last without RoPE
POOLS = [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True), (torch.float32, True)]


def close_to(dtype):
    return {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-5, "rtol": 1e-4}


@pytest.mark.parametrize("heads, width, rope", SHAPES)
@pytest.mark.parametrize(("dtype", "coded"), POOLS)
def test_attention_over_the_selected_rows(heads, width, rope, dtype, coded):
    step = Step([70, 5], [1, 1], 2)
    q, pool = step.normal(step.count, heads, width + rope), step.latents(width, rope, dtype, coded)
    where = step.page_table, step.request, selection_of(step, 40)
    right = reference.sparse_attention(q, pool, *where, 0.08, width)
    torch.testing.assert_close(
        sparse_attention(q, pool, *where, 0.08, width, AttendConfig(splits=2)), right, **close_to(dtype)
    )
    torch.testing.assert_close(
        sparse_attention(q, pool, *where, 0.08, width, AttendConfig(splits=1)), right, **close_to(dtype)
    )
    w_uv = step.normal(heads, 24, width, dtype=torch.bfloat16) / width**0.5
    values = torch.einsum("thc,hvc->thv", right, w_uv.float()).flatten(1)
    found = attend_values(q, pool, *where, 0.08, w_uv, AttendConfig(splits=3, rows=16))
    torch.testing.assert_close(found, values, **close_to(dtype))
    slices = attend_values(q, pool, *where, 0.08, w_uv, AttendConfig(slices=2)).unflatten(0, (2, -1))
    torch.testing.assert_close(slices.sum(0), values, **close_to(dtype))


def test_more_heads_than_a_program_takes(monkeypatch):
    step = Step([70], [2], 2)
    q, pool = step.normal(2, 20, 96), step.latents(64, 32)
    where = step.page_table, step.request
    for module in (attend, dense):
        monkeypatch.setattr(module, "MOST_HEADS", 16)
    chosen = selection_of(step, 40)
    right = reference.sparse_attention(q, pool, *where, chosen, 0.08, 64)
    torch.testing.assert_close(
        sparse_attention(q, pool, *where, chosen, 0.08, 64, AttendConfig(splits=2)), right, **close_to(pool.numbers)
    )
    right = reference.sparse_attention(q, pool, *where, reference.select_all(step.positions, 128), 0.08, 64)
    found = dense_attention(q, pool, *where, step.positions, 0.08, 64)
    torch.testing.assert_close(found, right, **close_to(pool.numbers))


def test_a_last_tile_of_few_rows_has_a_split_of_its_own():
    """Of 2,051 rows, which GLM-5.3-Flash selects, as of 35: else all splits would take a tile more for three rows."""
    step = Step([70], [1], 2)
    q, pool = step.normal(1, 4, 64), step.latents(64, 0)
    where = step.page_table, step.request
    for k, wanted in ((32, 2), (35, 3), (49, 2)):
        chosen, how = selection_of(step, k), AttendConfig(splits=2, tile=16).resolve(1, k, False, 4)
        part, most, total, splits = attend._attend(q, pool, *where, chosen, 0.08, 64, how)
        assert splits == wanted
        right = reference.sparse_attention(q, pool, *where, chosen, 0.08, 64)
        torch.testing.assert_close(attend.combine_splits(part, most, total), right, **close_to(pool.numbers))


def test_programs_share_the_selection_of_a_token_where_tokens_are_few():
    """The longest multiprocessor has the least to do."""
    wanted = {24: 5, 32: 4, 48: 8, 64: 2, 96: 4, 128: 1, 192: 2, 256: 1, 4096: 1}
    assert {t: choose_splits(t, 32) for t in wanted} == wanted
    assert choose_splits(32, 1) == 1


@pytest.mark.parametrize("rope", [32, 0])
@pytest.mark.parametrize("coded", [False, True])
def test_attention_of_a_prefill_over_the_selected_rows(rope, coded):
    step, size = Step([90, 20], [14, 3], 2), 64 + rope
    q, pool = step.normal(step.count, 4, size), step.latents(64, rope, coded=coded)
    where = step.page_table, step.request, selection_of(step, 40)
    # Page 0 is where padding is written: no request's, and never read.
    pool = spoil(pool, torch.arange(len(pool.data), device=DEVICE) < 64)
    assert is_taken(4, pool, 64)
    right = reference.sparse_attention(q, pool, *where, 0.08, 64)
    torch.testing.assert_close(sparse_attention(q, pool, *where, 0.08, 64), right, **close_to(pool.numbers))
    torch.testing.assert_close(sparse_attention_of_many(q, pool, *where, 0.08, 64), right, **close_to(pool.numbers))


@pytest.mark.parametrize("heads, width, rope", SHAPES)
@pytest.mark.parametrize(("dtype", "coded"), POOLS)
def test_attention_over_every_position(heads, width, rope, dtype, coded):
    step = Step([70, 5, 40], [3, 1, 4], 2)
    step.request[-2:], step.positions[-2:] = 0, 0  # padding
    q, pool = step.normal(step.count, heads, width + rope), step.latents(width, rope, dtype, coded)
    where = step.page_table, step.request
    right = reference.sparse_attention(q, pool, *where, reference.select_all(step.positions, 128), 0.08, width)
    found = dense_attention(q, pool, *where, step.positions, 0.08, width)
    torch.testing.assert_close(found, right, **close_to(dtype))


# Real shapes, on a GPU: one rank of eight of DeepSeek V3.2.


@pytest.mark.gpu
@pytest.mark.parametrize("t, context", [(1, 8192), (3, 300), (16, 8192), (1, 40000 // 64 * 64), (100, 4096)])
def test_real_shapes_on_a_gpu(t, context):
    lengths = [context] if t in (1, 100) else [context - 37 * i for i in range(t)]
    step = Step(lengths, [t] if t == 100 else [1] * t, context // 64 + 1)
    q, rotation = step.normal(t, 64, 128), step.rotation(64)
    keys, weights = step.normal(step.pages * 64, 128, dtype=torch.bfloat16), step.normal(t, 192)[:, 128:]
    turned = torch.cat([reference.rotate(q[..., :64], rotation, False), q[..., 64:]], 2)
    right = reference.index_logits(turned, weights * 0.01, keys, *step.where())
    found = index_logits(q, weights, keys, *step.where(), rotation, False, 0.01)
    assert torch.equal(found.isinf(), right.isinf())
    error = (found - right).nan_to_num().abs().max()
    print(f"scores: largest error {error:.1e}")
    assert error < 2e-4

    query, w_uk = step.normal(t, 16, 192), step.normal(16, 128, 512, dtype=torch.bfloat16) / 11
    selection, absorbed = select_and_absorb(found, step.positions, 2048, query, w_uk, rotation)
    assert torch.equal(selection, reference.select(found, step.positions, 2048))
    assert torch.equal(select(found, step.positions, 2048, SelectConfig(warps=32)), selection)
    torch.testing.assert_close(absorbed, absorbed_queries(query, w_uk, rotation), atol=1e-4, rtol=1e-5)

    pool = step.latents(512, 64)
    where = step.page_table, step.request, selection
    right = reference.sparse_attention(absorbed, pool, *where, 0.07, 512)
    found = sparse_attention(absorbed, pool, *where, 0.07, 512)
    print(f"attention: largest error {(found - right).abs().max():.1e}")
    torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-3)
    w_uv = step.normal(16, 128, 512, dtype=torch.bfloat16) / 22
    values = torch.einsum("thc,hvc->thv", right, w_uv.float()).flatten(1)
    torch.testing.assert_close(attend_values(absorbed, pool, *where, 0.07, w_uv), values, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(sparse_attention_of_many(absorbed, pool, *where, 0.07, 512), right, atol=2e-4, rtol=1e-3)
    if context > 2048:
        return
    everything = reference.select_all(step.positions, context)
    right = reference.sparse_attention(absorbed, pool, step.page_table, step.request, everything, 0.07, 512)
    found = dense_attention(absorbed, pool, step.page_table, step.request, step.positions, 0.07, 512)
    torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
def test_a_prefill_attends_to_everything_on_a_gpu():
    step = Step([1000, 640, 70], [1000, 333, 70], 16)
    absorbed, pool = step.normal(step.count, 16, 576), step.latents(512, 64)
    everything = reference.select_all(step.positions, 1024)
    right = reference.sparse_attention(absorbed, pool, step.page_table, step.request, everything, 0.07, 512)
    found = dense_attention(absorbed, pool, step.page_table, step.request, step.positions, 0.07, 512)
    print(f"attention: largest error {(found - right).abs().max():.1e}")
    torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice_on_a_gpu():
    step = Step([8000, 5000], [1, 1], 126)
    q, rotation = step.normal(2, 64, 128), step.rotation(64)
    keys, weights = step.normal(step.pages * 64, 128, dtype=torch.bfloat16), step.normal(2, 64)
    query, w_uk = step.normal(2, 16, 192), step.normal(16, 128, 512, dtype=torch.bfloat16)
    pool = step.latents(512, 64)

    def run():
        logits = index_logits(q, weights, keys, *step.where(), rotation)
        selection, absorbed = select_and_absorb(logits, step.positions, 2048, query, w_uk, rotation)
        return attend_values(absorbed, pool, step.page_table, step.request, selection, 0.07, w_uk)

    first = run()
    for _ in range(5):
        assert torch.equal(run(), first)
