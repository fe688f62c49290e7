"""Pooled index keys in kernels against plain torch: written, scored, selected."""

import pytest
import torch
from tiny_models import page_table, step_batch
from torch import Tensor
from triton.runtime import interpreter

from saccade.kernels import PAGE, reference
from saccade.kernels.indexer import pools
from saccade.kernels.indexer.logits import ScoreConfig, index_logits
from saccade.kernels.indexer.select import SelectConfig, select
from saccade.kernels.types import CacheRows, IndexKeys, KeyNorm, Latents, Matrix, Norm, Pooling, Rotation
from saccade.ops.gpu import Gpu
from saccade.ops.interface import QueryWeights
from saccade.ops.reference import Reference
from saccade.ops.step import Batch, Cache, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, LORA, LOW = 24, 32, 48


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def to_device(batch: Batch) -> Batch:
    return Batch(**{name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in vars(batch).items()})


def make_batch(starts: list[int], sizes: list[int], padding: int) -> Batch:
    chunks = [(r, [0] * n, start) for r, (start, n) in enumerate(zip(starts, sizes, strict=True))]
    batch = step_batch(chunks, page_table([192] * len(starts)), padding)
    batch.state_slots = torch.arange(1, 1 + len(starts))
    return to_device(batch)


@pytest.fixture(params=[False, True], ids=["in order", "last program first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the interpreter run one after the other; a kernel must not depend on which comes first."""
    if request.param and DEVICE == "cpu":
        monkeypatch.setattr(
            interpreter, "range", lambda *a: reversed(range(*a)) if len(a) == 1 else range(*a), raising=False
        )


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(
    ("pool", "starts", "sizes", "is_fp8"),
    [
        (4, [11, 0], [1, 1], False),  # a pool's last token, a request's first
        (4, [6, 0, 5], [3, 12, 30], False),  # longer than the ring
        (16, [13, 30, 15], [1, 24, 1], True),
        (2, [2, 7], [70, 9], True),
    ],
)
def test_keys_of_pools_and_of_the_latest_tokens(pool: int, starts: list[int], sizes: list[int], is_fp8: bool) -> None:
    """As `Reference` writes them: behind what earlier steps left in the ring, and beside rows that write over it."""
    batch, count = make_batch(starts, sizes, 3), sum(sizes)
    tokens, rotation = len(batch.tokens), Rotation(*torch.empty(2, count + 3, 0, device=DEVICE))
    w = QueryWeights(Norm(draw(LOW).abs(), 1e-5), Matrix(draw(40, LOW)), draw(4, 10, LORA))
    norm = KeyNorm(draw(DIM), draw(DIM, seed=1), 1e-6, False)
    low, projected = draw(tokens, LOW + LORA), draw(tokens, 2 * DIM + 8)
    key, gate, _ = projected.split([DIM, DIM, 8], dim=1)
    ring = draw(len(starts) + 1, pool + 6, 2 * DIM)
    found = []
    for ops in (Reference(), Gpu()):
        rows = len(starts) * 3 * PAGE + PAGE
        latent, recent = Latents(draw(rows, LORA)), ring.clone()
        keys = torch.zeros(rows // pool, DIM, dtype=torch.float8_e4m3fn if is_fp8 else torch.float32, device=DEVICE)
        index = IndexKeys(keys, torch.zeros(rows // pool, device=DEVICE) if is_fp8 else None)
        pooling = Pooling(pool, draw(pool, DIM), gate, recent)
        cache_rows = CacheRows(Norm(draw(LORA).abs(), 1e-5), latent, key, norm, index, pooling)
        ops.make_queries(Step(batch, Cache((latent,), (index,)), rotation, None), low, w, cache_rows)
        numbers = keys.float() if index.scales is None else keys.float() * index.scales[:, None]
        found.append((latent.data[PAGE:], numbers[PAGE // pool :], recent[1:]))
    for expected, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, expected, rtol=2e-5, atol=2e-5)
    assert (found[0][2] != ring[1:]).any(2).sum() == sum(min(n, pool + 6) for n in sizes)


@pytest.mark.parametrize(("pool", "dtype"), [(4, torch.bfloat16), (16, torch.float32), (2, torch.float8_e4m3fn)])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [9, 40, 3]])
def test_scores_of_pools(pool: int, dtype: torch.dtype, sizes: list[int]) -> None:
    batch = make_batch([70, 130, 2], sizes, 0)
    tokens, where = sum(sizes), (batch.page_table, batch.request)
    q, weights, page = draw(tokens, 4, 32), draw(tokens, 4), PAGE // pool
    rows = 10 * page
    keys, scales = draw(rows, 32).to(dtype), None
    if dtype == torch.float8_e4m3fn:
        q, scales = q.bfloat16(), draw(rows).abs()
    last = (batch.positions + 1) // pool - 1
    right = reference.index_logits(q.float(), weights, keys, *where, last, key_scales=scales, page=page)
    for config in (None, ScoreConfig(chunk=64)):
        found = index_logits(q, weights, keys, *where, batch.positions, key_scales=scales, pool=pool, config=config)
        torch.testing.assert_close(found, right, atol=3e-3, rtol=1e-5)


@pytest.mark.parametrize("block", [8192, 64])
@pytest.mark.parametrize("pool", [2, 4, 16])
def test_tokens_of_the_best_pools_and_of_the_incomplete_one(pool: int, block: int) -> None:
    positions = torch.tensor([0, pool - 2, pool - 1, pool, 20 * pool - 2, 20 * pool + 1, 191 * pool + pool // 2])
    logits = draw(len(positions), 192).cpu()
    logits[:, 5:60:3] = 0.25  # ties
    last = (positions + 1) // pool - 1
    hidden = torch.arange(192) > last[:, None]
    logits = logits.masked_fill(hidden, torch.nan)  # what follows is not read
    best = reference.select(logits.masked_fill(hidden, -torch.inf), last, 16)
    right = pools.expand_pools(best, positions, pool)
    found = select(logits.to(DEVICE), positions.to(DEVICE), 16, SelectConfig(block=block), pool)
    assert found.dtype == torch.int32 and found.cpu().equal(right)


def test_a_score_that_is_no_number_hides_the_incomplete_pool_too() -> None:
    """Attention over its tokens alone would be a number."""
    positions = torch.tensor([42, 42, 2])
    logits = draw(3, 16).cpu()
    logits[1, 7] = logits[2, 3] = torch.nan  # the last token has no complete pool
    last = (positions + 1) // 4 - 1
    visible = logits.masked_fill(torch.arange(16) > last[:, None], -torch.inf)
    right = pools.expand_pools(reference.select(visible, last, 6), positions, 4)
    assert (right >= 0).sum(1).tolist() == [6 * 4 + 3, 0, 3]
    assert select(logits.to(DEVICE), positions.to(DEVICE), 6, pool=4).cpu().equal(right)
