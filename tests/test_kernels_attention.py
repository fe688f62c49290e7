"""Kernels of the indexer and of sparse attention against reference.py: in the interpreter, or on a GPU."""

import pytest
import torch

from saccade.kernels import reference
from saccade.kernels.attend import attend_values, sparse_attention
from saccade.kernels.dense import dense_attention
from saccade.kernels.score import index_logits
from saccade.kernels.select import absorb, select, select_and_absorb

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step:
    """Requests of several lengths, each with some tokens at its end, in a pool of shuffled pages."""

    def __init__(self, lengths, tokens, pages, seed=0, device=DEVICE):
        self.random = torch.Generator().manual_seed(seed)
        self.device = device
        order = torch.randperm(len(lengths) * pages, generator=self.random) + 1
        self.page_table = order.view(len(lengths), pages).to(device)
        self.pages = len(lengths) * pages + 1
        pairs = [(r, p) for r, (n, t) in enumerate(zip(lengths, tokens, strict=True)) for p in range(n - t, n)]
        self.request = torch.tensor([r for r, _ in pairs], device=device)
        self.positions = torch.tensor([p for _, p in pairs], device=device)
        self.count = len(pairs)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.random).to(self.device, dtype)

    def rotation(self, rope):
        angle = self.normal(self.count, rope // 2)
        return reference.Rotation(angle.cos(), angle.sin())

    def where(self):
        return self.page_table, self.request, self.positions


STEPS = [([70, 130, 5], [1, 1, 1]), ([200], [1]), ([90, 170, 20], [7, 11, 5])]


@pytest.mark.parametrize("lengths, tokens", STEPS)
@pytest.mark.parametrize("style", ["rotated", "halves", "interleaved"])
def test_scores_of_keys_in_pages(lengths, tokens, style):
    step = Step(lengths, tokens, 4)
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
        index_logits(q, weights, keys, *step.where(), **options),
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
        "zeros": (x - 1.5).relu() * torch.where(x > 2, 1.0, -1.0),
        "equal": torch.full_like(x, 0.75),
        "wide": (x * 30).exp() * x.sign(),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "steps", "zeros", "equal", "wide"])
@pytest.mark.parametrize("size, k, block", [(192, 16, 16384), (448, 24, 64), (64, 200, 16384), (448, 30, 64)])
def test_the_best_logits_are_selected_exactly(kind, size, k, block):
    random = torch.Generator().manual_seed(size)
    positions = torch.tensor([size - 1, 0, k - 1, k, 64]).clamp(max=size - 1)
    logits = logits_of(kind, random, len(positions), size)
    hidden = torch.arange(size) > positions[:, None]
    right = reference.select(logits.masked_fill(hidden, float("-inf")), positions, k)
    given = logits.masked_fill(hidden, 1e9)  # what lies behind a token's position is not read
    found = select(given.to(DEVICE), positions.to(DEVICE), k, block=block)
    assert found.dtype == torch.int32 and torch.equal(found.cpu(), right)


def absorbed_queries(q, w_uk, rotation):
    nope = w_uk.shape[1]
    taken = torch.einsum("thn,hnc->thc", q[..., :nope].double(), w_uk.double()).float()
    return torch.cat([taken, reference.rotate(q[..., nope:], rotation, True)], 2)


@pytest.mark.parametrize("heads, nope, lora, rope", [(4, 64, 256, 64), (3, 48, 80, 16)])
def test_queries_are_absorbed_beside_the_selection(heads, nope, lora, rope):
    step = Step([70, 130], [1, 2], 3)
    q, rotation = step.normal(step.count, heads, nope + rope), step.rotation(rope)
    w_uk = step.normal(heads, nope, lora, dtype=torch.bfloat16)
    logits = step.normal(step.count, 192)
    right = absorbed_queries(q, w_uk, rotation)
    torch.testing.assert_close(absorb(q, w_uk, rotation), right, atol=1e-4, rtol=1e-5)
    selection, absorbed = select_and_absorb(logits, step.positions, 16, q, w_uk, rotation)
    torch.testing.assert_close(absorbed, right, atol=1e-4, rtol=1e-5)
    assert torch.equal(selection, select(logits, step.positions, 16))


# Attention.


def selection_of(step, k):
    context = step.pages // step.page_table.shape[0] * 64
    logits = step.normal(step.count, context)
    hidden = torch.arange(context, device=step.device) > step.positions[:, None]
    return reference.select(logits.masked_fill(hidden, float("-inf")), step.positions, k)


SHAPES = [(4, 256, 64), (16, 64, 16), (3, 48, 32)]
FLOATS = [torch.bfloat16, torch.float32]


def close_to(dtype):
    return {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-5, "rtol": 1e-4}


@pytest.mark.parametrize("heads, width, rope", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_over_the_selected_rows(heads, width, rope, dtype):
    step = Step([70, 5], [1, 2], 3)
    q, pool = step.normal(step.count, heads, width + rope), step.normal(step.pages * 64, width + rope, dtype=dtype)
    where = step.page_table, step.request, selection_of(step, 60)
    right = reference.sparse_attention(q, pool, *where, 0.08, width)
    torch.testing.assert_close(sparse_attention(q, pool, *where, 0.08, width, splits=2), right, **close_to(dtype))
    torch.testing.assert_close(sparse_attention(q, pool, *where, 0.08, width, splits=1), right, **close_to(dtype))
    w_uv = step.normal(heads, 24, width, dtype=torch.bfloat16) / width**0.5
    values = torch.einsum("thc,hvc->thv", right, w_uv.float()).flatten(1)
    found = attend_values(q, pool, *where, 0.08, w_uv, splits=3, rows=16, tokens=2)
    torch.testing.assert_close(found, values, **close_to(dtype))


def test_attention_of_a_prefill_over_the_selected_rows():
    step = Step([90, 20], [14, 3], 2)
    q, pool = step.normal(step.count, 4, 96), step.normal(step.pages * 64, 96, dtype=torch.bfloat16)
    where = step.page_table, step.request, selection_of(step, 40)
    right = reference.sparse_attention(q, pool, *where, 0.08, 64)
    torch.testing.assert_close(sparse_attention(q, pool, *where, 0.08, 64), right, **close_to(pool.dtype))


@pytest.mark.parametrize("heads, width, rope", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_over_every_position(heads, width, rope, dtype):
    step = Step([70, 5, 40], [7, 3, 9], 2)
    step.request[-2:], step.positions[-2:] = 0, 0  # padding
    q, pool = step.normal(step.count, heads, width + rope), step.normal(step.pages * 64, width + rope, dtype=dtype)
    where = step.page_table, step.request
    right = reference.sparse_attention(q, pool, *where, reference.select_all(step.positions, 128), 0.08, width)
    found = dense_attention(q, pool, *where, step.positions, 0.08, width)
    torch.testing.assert_close(found, right, **close_to(dtype))
