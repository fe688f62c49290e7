"""The specification against slower, more obvious words for the same thing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import encode, page_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.kernels import PAGE
from saccade.kernels import reference as ops
from saccade.kernels.types import Latents, Matrix, Routing

F8 = torch.float8_e4m3fn


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_codes(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=dice()) * 50).to(F8)


def decode_slowly(codes: Tensor, scale: Tensor, group: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> Tensor:
    out = torch.empty(codes.shape)
    for i in range(codes.shape[-2]):
        for j in range(codes.shape[-1]):
            block = (..., (i + origin[0]) // group[0], (j + origin[1]) // group[1])
            out[..., i, j] = codes[..., i, j].float() * scale[block].float()
    return out


# Weights.


@pytest.mark.parametrize("group", [(4, 4), (8, 3), (1, 16), (100, 100)])
def test_dequantize_multiplies_each_code_by_the_scale_of_its_group(group):
    codes = make_codes(13, 22)  # ragged for every group
    scale = torch.rand(-(-13 // group[0]), -(-22 // group[1]), generator=dice())
    assert ops.dequantize(codes, scale, group).equal(decode_slowly(codes, scale, group))


@pytest.mark.parametrize("box", [(0, 0, 13, 22), (3, 0, 9, 22), (5, 7, 6, 11), (12, 21, 13, 22)])
def test_a_box_of_a_tensor_is_decoded_with_the_tensors_own_scale(box):
    top, left, bottom, right = box
    codes, scale, group = make_codes(13, 22), torch.rand(4, 5, generator=dice()), (4, 5)
    whole = decode_slowly(codes, scale, group)
    part = ops.dequantize(codes[top:bottom, left:right], scale, group, origin=(top, left))
    assert part.equal(whole[top:bottom, left:right])


def test_e8m0_scales_are_powers_of_two():
    scale = torch.exp2(torch.randint(-20, 20, (3, 2), generator=dice()).float())
    codes = make_codes(9, 8)
    assert ops.dequantize(codes, scale.to(torch.float8_e8m0fnu), (4, 4)).equal(decode_slowly(codes, scale, (4, 4)))


def test_leading_axes_count_experts():
    codes, scale = make_codes(3, 7, 10), torch.rand(3, 2, 3, generator=dice())
    together = ops.dequantize(codes, scale, (4, 4))
    for e in range(3):
        assert together[e].equal(decode_slowly(codes[e], scale[e], (4, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["fp8", "f32", "bf16", "tensor"])
def test_linear_multiplies_in_fp32_and_rounds_once(storage, dtype):
    x, w = torch.randn(5, 70, generator=dice(1)).to(dtype), torch.randn(50, 70, generator=dice(2))
    stored = {"fp8": encode(w), "f32": Matrix(w), "bf16": Matrix(w.bfloat16()), "tensor": w}[storage]
    numbers = stored if isinstance(stored, Tensor) else stored.data.float()
    if storage == "fp8":
        numbers = decode_slowly(stored.data, stored.scale, stored.group)
    exact = x.double() @ numbers.double().T
    assert ops.linear(x, stored).dtype == dtype
    torch.testing.assert_close(ops.linear(x, stored, torch.float32).double(), exact, rtol=1e-5, atol=1e-5)
    assert ops.linear(x, stored).equal(ops.linear(x, stored, torch.float32).to(dtype))


# Norms and rotary embedding.


def test_norms_compute_in_fp32_whatever_the_input_is():
    x = torch.randn(4, 32, generator=dice()).bfloat16()
    weight, bias = torch.randn(32, generator=dice(1)), torch.randn(32, generator=dice(2))
    y = x.double()
    rms = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    centred = y - y.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert ops.rms_norm(x, weight, 1e-5).equal(rms.bfloat16())
    assert ops.layer_norm(x, weight, bias, 1e-6).equal(layer.bfloat16())


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotate_multiplies_pairs_by_a_complex_number(interleaved):
    x, angle = torch.randn(5, 3, 8, generator=dice()), torch.randn(5, 4, generator=dice(1))
    turned = ops.rotate(x, ops.Rotation(angle.cos(), angle.sin()), interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    for i, (a, b) in enumerate(pairs):
        expected = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5), angle[:, i])[:, None]
        torch.testing.assert_close(torch.complex(turned[..., a], turned[..., b]), expected)


# Tiles.


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.data())
def test_tiles_hold_every_row_once_beside_rows_of_its_group(n_groups, size, data):
    group = torch.tensor(data.draw(st.lists(st.integers(0, n_groups - 1), min_size=1, max_size=40)))
    tiles = ops.tile_by(group, n_groups, size)
    n = len(group)
    assert len(tiles.group_of_tile) == min(n, n // size + n_groups)
    assert tiles.group_of_tile[tiles.tile_of_row].equal(group)
    places = tiles.tile_of_row * size + tiles.offset_of_row
    assert len(set(places.tolist())) == n and int(tiles.offset_of_row.max()) < size
    for g in range(n_groups):  # in order, and dense: a group fills each of its tiles before the next
        mine = places[group == g]
        assert mine.equal(mine[:1] + torch.arange(len(mine))) and bool((mine[:1] % size == 0).all())
    rows = torch.randn(n, 3)
    assert tiles.collect(tiles.spread(rows)).equal(rows)


# The indexer.


def select_slowly(logits: Tensor, positions: Tensor, k: int) -> list[list[int]]:
    width = min(k, logits.shape[1])
    chosen = []
    for row, own in zip(logits.tolist(), positions.tolist(), strict=True):
        best = sorted(range(min(own + 1, len(row))), key=lambda s: (-row[s], s))[:width]
        chosen.append(sorted(best) + [-1] * (width - len(best)))
    return chosen


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 40), st.integers(1, 5), st.integers(0, 999))
def test_select_takes_the_best_and_of_equals_the_earliest(rows, width, k, levels, seed):
    logits = torch.randint(0, levels, (rows, width), generator=dice(seed)) - 1.0  # mostly ties
    positions = torch.randint(0, width, (rows,), generator=dice(seed + 1))
    logits = logits.masked_fill(torch.arange(width) > positions[:, None], float("-inf"))
    selection = ops.select(logits, positions, k)
    assert selection.dtype == torch.int32
    assert selection.tolist() == select_slowly(logits, positions, k)


def test_select_all_is_select_with_room_for_everything():
    positions = torch.tensor([0, 3, 9])
    logits = torch.randn(3, 10, generator=dice()).masked_fill(torch.arange(10) > positions[:, None], float("-inf"))
    assert ops.select_all(positions, 10).equal(ops.select(logits, positions, 10))


def make_pool(lengths: list[int], width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A pool, its page table, and the rows of each request in order of position."""
    table = page_table(lengths)
    pool = torch.randn((int(table.max()) + 1) * PAGE, width, generator=dice(7))
    return pool, table, [pool.unflatten(0, (-1, PAGE))[pages].flatten(0, 1) for pages in table]


@pytest.mark.parametrize("one_each", [True, False])
def test_index_logits_are_weighted_relu_scores_of_the_tokens_past(one_each):
    pool, table, keys = make_pool([150, 60, 100], 8)
    request = torch.tensor([2, 0, 1]) if one_each else torch.tensor([0] * 20 + [2] * 3 + [1] + [0] * 2)
    positions = torch.randint(0, 60, request.shape, generator=dice())
    q, weights = torch.randn(len(request), 12, 8, generator=dice(1)), torch.randn(len(request), 12, generator=dice(2))
    logits = ops.index_logits(q, weights, pool, table, request, positions)
    assert logits.shape == (len(request), table.shape[1] * PAGE) and logits.dtype == torch.float32
    for t, (r, own) in enumerate(zip(request.tolist(), positions.tolist(), strict=True)):
        past = keys[r][: own + 1]
        expected = sum(weights[t, h] * (past @ q[t, h]).relu() for h in range(12))
        torch.testing.assert_close(logits[t, : own + 1], expected)
        assert bool((logits[t, own + 1 :] == float("-inf")).all())


class CountBytes(TorchDispatchMode):
    """What operations allocate."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)}
        new = [x.untyped_storage() for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.count += sum(storage.nbytes() for storage in new if storage.data_ptr() not in given)
        return found


def test_index_logits_of_a_long_piece_hold_few_keys_and_their_scores_once():
    pool, table, _ = make_pool([1024, 1024], 128)
    request = torch.tensor([0] * 200 + [1] * 56)
    q, weights = torch.randn(256, 4, 128, generator=dice(1)), torch.randn(256, 4, generator=dice(2))
    with CountBytes() as allocated:
        ops.index_logits(q, weights, pool, table, request, request.new_full([256], 900))
    assert allocated.count < 4 * (4 * weights.numel() * 1024)  # in tiles of 16 rows 4.8 times their scores, copied 7


@pytest.mark.parametrize("one_each", [True, False])
def test_index_logits_of_codes_are_those_of_the_decoded_vectors_bit_for_bit(one_each):
    pool, table, _ = make_pool([150, 60, 100], 16)
    pool *= torch.logspace(-3, 3, len(pool))[:, None]
    request = torch.tensor([2, 0, 1]) if one_each else torch.tensor([0] * 20 + [2] * 3 + [1] + [0] * 2)
    positions = torch.randint(0, 60, request.shape, generator=dice())
    q, weights = torch.randn(len(request), 12, 16, generator=dice(1)), torch.randn(len(request), 12, generator=dice(2))
    (codes, scales), (q_codes, q_scales) = ops.quantize_rows(pool), ops.quantize_rows(q)
    where = table, request, positions
    found = ops.index_logits(q_codes, weights * q_scales, codes, *where, scales)
    decoded = q_codes.float() * q_scales[..., None], weights, codes.float() * scales[:, None]
    assert found.equal(ops.index_logits(*decoded, *where))
    assert not found.equal(ops.index_logits(q, weights, pool, *where))


def test_rows_are_quantised_with_the_least_power_of_two_that_holds_them():
    just_above = torch.tensor(448.0).nextafter(torch.tensor(torch.inf))
    amax = torch.cat([torch.rand(200, generator=dice()) * 10.0 ** torch.randint(-5, 6, (200,), generator=dice()),
                      torch.tensor([448.0, just_above, 224.0, 1e-4, 1e-9, 0.0, 2.0**20, 7.0, 0.875])])  # fmt: skip
    x = torch.rand(len(amax), 3, 32, generator=dice(1)) * 2 - 1
    x *= (amax[:, None] / x.abs().amax(-1))[..., None]
    codes, scales = ops.quantize_rows(x)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (
        torch.float8_e4m3fn, x.shape, torch.float32, x.shape[:2],
    )  # fmt: skip
    for vector, held, scale in zip(x.flatten(0, 1), codes.flatten(0, 1), scales.flatten().tolist(), strict=True):
        largest = max(float(vector.abs().max()), float(torch.tensor(1e-4)))
        assert math.frexp(scale)[0] == 0.5 and scale * 224 < largest <= scale * 448
        nearest = vector.double() / scale
        assert ((held.double() - nearest).abs() <= (nearest.abs() / 16).clamp(min=2.0**-10)).all()
    again, same = ops.quantize_rows(codes.float() * scales[..., None])
    assert (again.float() * same[..., None]).equal(codes.float() * scales[..., None])  # what was rounded stays


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_with_a_number_that_is_not_finite_has_no_scale(value):
    x = torch.ones(3, 16)
    x[1, 5] = value
    codes, scales = ops.quantize_rows(x)
    assert scales.isnan().tolist() == [False, True, False]
    assert codes[1].float().isnan().all() and codes[[0, 2]].float().isfinite().all()


@pytest.mark.parametrize("rope", [8, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_coded_latents_are_what_quantising_says_beside_their_rope(rope, dtype):
    """Decoded by hand; and a BF16 number holds each of them."""
    codes = torch.zeros(2 * PAGE, 32).to(F8)
    pool = Latents(codes, torch.zeros(2 * PAGE, rope, dtype=dtype), torch.zeros(2 * PAGE))
    assert (pool.width, pool.numbers) == (32 + rope, dtype)
    rows, slots = torch.randn(3, 32 + rope, generator=dice()) * torch.tensor([[1e-3], [1.0], [300.0]]), [70, 64, 127]
    ops.write_latents(pool, torch.tensor([*slots[:2], slots[2]]), rows)
    found = ops.read_latents(pool, torch.tensor(slots))
    held, scales = ops.quantize_rows(rows[:, :32])
    assert found[:, :32].equal(held.float() * scales[:, None]) and found[:, 32:].equal(rows[:, 32:].to(dtype).float())
    assert found[:, :32].bfloat16().float().equal(found[:, :32])
    assert (found[:, :32] - rows[:, :32]).norm() < 0.035 * rows[:, :32].norm()
    assert ops.read_latents(pool, slice(64, 65)).equal(found[1:2])
    assert ops.read_latents(pool, torch.tensor([[64, 3]]))[0, 1].count_nonzero() == 0


def test_one_scale_of_a_latent_is_as_good_as_one_for_128_numbers():
    """Even beside a number 1,000 times as large as the others: e4m3 is floating."""
    x = torch.randn(50, 512, generator=dice())
    x[:, 7] = 1000.0

    def find_error(groups):
        codes, scales = ops.quantize_rows(groups)
        off = (codes.float() * scales[..., None] - groups).flatten(1)
        off[:, 7] = 0
        return float(off.norm()) / x.flatten()[x.flatten() != 1000.0].norm()

    assert abs(find_error(x[:, None]) / find_error(x.unflatten(1, (4, 128))) - 1) < 0.01


def test_fp8_rows_are_written_as_codes():
    pool = torch.zeros(2 * PAGE, 16, dtype=torch.float8_e4m3fn)
    codes, _ = ops.quantize_rows(torch.randn(3, 16, generator=dice()))
    ops.write_rows(pool, torch.tensor([70, -1, 65]), codes)
    assert pool[[70, 0, 65]].float().equal(codes.float())
    assert int((pool.float() != 0).any(1).sum()) == 3


# Attention.


@pytest.mark.parametrize("one_each", [True, False])
def test_sparse_attention_is_dense_attention_with_a_mask(one_each):
    pool, table, latents = make_pool([150, 60, 100], 12)
    request = torch.tensor([2, 0, 1]) if one_each else torch.tensor([0] * 30 + [2] * 3 + [1] * 7)
    q = torch.randn(len(request), 4, 12, generator=dice(1))
    selection = torch.full((len(request), 9), -1, dtype=torch.int32)
    for t in range(len(request)):
        n = 1 + t % 9
        selection[t, :n] = torch.randperm(60, generator=dice(t))[:n].sort().values
    out = ops.sparse_attention(q, Latents(pool), table, request, selection, 0.3, 10)
    for t, r in enumerate(request.tolist()):
        mask = torch.full((latents[r].shape[0],), float("-inf"))
        mask[selection[t][selection[t] >= 0].long()] = 0
        expected = (q[t] @ latents[r].T * 0.3 + mask).softmax(-1) @ latents[r][:, :10]
        torch.testing.assert_close(out[t], expected)


def test_padding_is_written_to_the_page_that_belongs_to_nobody():
    pool = torch.zeros(2 * PAGE, 3)
    ops.write_rows(pool, torch.tensor([70, -1, 65]), torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 3))
    assert pool[:, 0].nonzero().flatten().tolist() == [0, 65, 70]
    assert pool[[65, 70], 1].tolist() == [3.0, 1.0]


# Experts.


def test_route_chooses_by_biased_scores_and_weighs_by_unbiased_ones():
    x, gate, bias = (torch.randn(s, generator=dice(i)) for i, s in enumerate([(20, 6), (12, 6), (12,)]))
    experts, weights = ops.choose_experts(ops.linear(x, gate), Routing(bias, 4, 2, 3, 2.5))
    for t in range(20):
        scores = torch.sigmoid(gate @ x[t])
        biased = (scores + bias).tolist()
        groups = [biased[i : i + 3] for i in range(0, 12, 3)]
        best = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        expected = sorted((e for e in range(12) if e // 3 in best), key=lambda e: -biased[e])[:3]
        assert experts[t].tolist() == expected
        torch.testing.assert_close(weights[t], scores[expected] / scores[expected].sum() * 2.5)


@pytest.mark.parametrize("storage", ["fp8", "f32"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_expert_mlp_is_the_weighted_sum_of_each_experts_mlp(tokens, storage):
    count, hidden, inner, topk = 6, 40, 24, 3
    gate_up, down = torch.randn(count, 2 * inner, hidden, generator=dice(1)), torch.randn(count, hidden, inner)
    stored = [encode(w) if storage == "fp8" else Matrix(w) for w in (gate_up, down)]
    numbers = [ops.decode(m) for m in stored]
    x = torch.randn(tokens, hidden, generator=dice(2))
    experts = torch.rand(tokens, count, generator=dice(3)).topk(topk).indices
    weights = torch.rand(tokens, topk, generator=dice(4))
    expected = torch.zeros(tokens, hidden)
    for t in range(tokens):
        for e, w in zip(experts[t], weights[t], strict=True):
            gate, up = (numbers[0][e] @ x[t]).chunk(2)
            expected[t] += w * (numbers[1][e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(ops.expert_mlp(x, experts, weights, *stored), expected, rtol=1e-4, atol=1e-3)


def test_ranks_choose_alike_and_keep_their_own() -> None:
    logits, routing = torch.randn(5, 12, generator=dice(1)), Routing(torch.zeros(12), 1, 1, 4, 2.5)
    experts, weights = ops.choose_experts(logits, routing)
    parts = [ops.choose_experts(logits, routing._replace(own=own)) for own in ((0, 6), (6, 8), (8, 12))]
    for first, (ids, own_weights) in zip((0, 6, 8), parts, strict=True):
        assert ids.eq(-1).equal(own_weights.eq(0)) and (ids[ids >= 0] + first).equal(experts[ids >= 0])
    assert torch.stack([own_weights for _, own_weights in parts]).sum(0).equal(weights)


def test_an_expert_of_another_rank_adds_nothing() -> None:
    """Not even where the expert that is computed in its place gives NaN."""
    gate_up, down = (torch.randn(3, *shape, generator=dice(1)) for shape in ((16, 20), (20, 8)))
    x, weights = torch.randn(2, 20, generator=dice(2)), torch.rand(2, 2, generator=dice(3))
    expected = ops.expert_mlp(x, torch.tensor([[1, 2], [2, 1]]), weights, Matrix(gate_up), Matrix(down))
    gate_up[0] = torch.nan
    some = ops.expert_mlp(x, torch.tensor([[1, -1], [-1, -1]]), weights, Matrix(gate_up), Matrix(down))
    others = ops.expert_mlp(x, torch.tensor([[-1, 2], [2, 1]]), weights, Matrix(gate_up), Matrix(down))
    assert some[1].equal(torch.zeros(20))
    torch.testing.assert_close(some + others, expected)


def test_every_fp8_code_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    for some in (codes, codes[2:9, 3:7], codes.T):  # views too
        torch.testing.assert_close(ops.read_codes(some), some.float(), rtol=0, atol=0, equal_nan=True)
