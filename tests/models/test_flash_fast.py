"""GLM-5.3-Flash in kernels against plain torch: states, caches, selections and hidden states of whole steps."""

from pathlib import Path

import pytest
import torch
from flash_models import ATTENTION, RECURRENT, add_mtp, write_flash
from tiny_models import page_table, step_batch
from torch import Tensor

from saccade import LLM
from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE
from saccade.kernels.recurrent.tokens import fits_kernels
from saccade.models.glm5_next.config import find_gpu_obstacle
from saccade.models.glm5_next.gpu import FlashGpu
from saccade.ops.step import Batch

CONTEXT, REQUESTS, PAGES = 42, 2, 4  # of each context 16 tokens are looked at, and those of the incomplete pool
TOKENS = torch.randint(2, 90, (REQUESTS, CONTEXT + 2), generator=torch.Generator().manual_seed(1)).tolist()


def make_batch(first: int, size: int, padding: int) -> Batch:
    """Tokens of each request, of which the second is a token behind; then padding."""
    chunks = [(r, TOKENS[r][first + r : first + r + size], first + r) for r in range(REQUESTS)]
    batch = step_batch(chunks, page_table([CONTEXT] * REQUESTS), padding)
    batch.state_slots = torch.arange(1, 1 + REQUESTS)
    return batch


@pytest.mark.parametrize(
    ("dtype", "index_cache", "sizes", "kinds", "changes"),
    [
        ("float32", "bf16", (1, 4), [RECURRENT, ATTENTION], {}),
        ("auto", "fp8", (1, 9), [ATTENTION, ATTENTION], {"indexer_types": ["full", "shared"], "index_kpool": 2}),
        ("auto", "bf16", (2,), [ATTENTION, RECURRENT], {"index_kpool": 16, "mlp_layer_types": ["sparse", "dense"]}),
    ],
)
def test_a_step_is_the_model_s(
    tmp_path: Path, dtype: str, index_cache: str, sizes: tuple[int, ...], kinds: list[str], changes: dict[str, object]
) -> None:
    write_flash(tmp_path, num_hidden_layers=2, layer_types=kinds, **changes)
    plain = LLM(tmp_path, dtype=dtype).model
    results, caches = [], []
    with torch.inference_mode():
        for model in (plain, plain.with_ops(FlashGpu())):
            options = {"index_cache": index_cache, "mtp": False, "requests": REQUESTS}
            cache = allocate_cache(plain.config, PAGES, dtype, "cpu", **options)
            first = CONTEXT - 2 - sum(sizes)
            plain.forward(make_batch(0, first, 0), cache)
            for size in sizes:
                seen: list[Tensor] = []
                hidden = model.forward(make_batch(first, size, 3), cache, seen)[: REQUESTS * size]
                results.append((hidden, torch.stack(seen)[:, : REQUESTS * size]))
                first += size
            caches.append(cache)
    for (expected, chosen), (found, selected) in zip(results[: len(sizes)], results[len(sizes) :], strict=True):
        assert selected.equal(chosen)
        # In "auto", inputs of experts are rounded to BF16 above 16 tokens.
        bound = 1e-4 if dtype == "float32" else 2e-4 if len(found) <= 16 else 2e-2
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "auto" else {"rtol": 1e-4, "atol": 1e-4}
    expected_cache, found_cache = caches
    for a, b in zip(found_cache.latent, expected_cache.latent, strict=True):
        torch.testing.assert_close(a.data[PAGE:].float(), b.data[PAGE:].float(), **close)
    for keys, same in zip(found_cache.index_keys, expected_cache.index_keys, strict=True):
        if keys is not None and same is not None:
            found_keys, right = (k.data[len(k.data) // PAGES :].float() for k in (keys, same))
            assert (found_keys != right).float().mean() < (1.0 if dtype == "float32" else 0.02)
            # A code is the next one where a number is between the two.
            torch.testing.assert_close(found_keys, right, **close | ({"rtol": 0.13} if index_cache == "fp8" else {}))
    for states, others in zip(found_cache.states, expected_cache.states, strict=True):
        for name, state in states.items():
            torch.testing.assert_close(state[1:], others[name][1:], **close)


@pytest.mark.parametrize("dim", [16, 128, 129, 256])
def test_what_the_kernels_do_not_hold_is_refused_before(tmp_path: Path, dim: int) -> None:
    """Otherwise a step would read numbers back, which no CUDA graph can hold."""
    write_flash(tmp_path, num_hidden_layers=1, layer_types=[RECURRENT], linear_head_dim=dim, linear_num_heads=1)
    plain = LLM(tmp_path, dtype="auto", mtp=False).model
    obstacle = find_gpu_obstacle(plain.config)
    assert fits_kernels(plain.layers[0].block.recurrence.delta) == (not obstacle)
    assert not obstacle or f"have {dim} dimensions" in obstacle


@pytest.mark.parametrize("size", [1, 3])
def test_a_draft_step_is_the_mtp_layer_s(tmp_path: Path, size: int) -> None:
    """Whose residual is one stream."""
    write_flash(tmp_path, num_hidden_layers=1, layer_types=[RECURRENT])
    add_mtp(tmp_path)
    plain = LLM(tmp_path, dtype="float32", speculate=1).model
    first, results = CONTEXT - 2 - size, []
    states = torch.randn(REQUESTS, CONTEXT, 64, generator=torch.Generator().manual_seed(2))

    def run(mtp: object, start: int, count: int, padding: int) -> tuple[Tensor, Tensor]:
        following = [TOKENS[r][start + r + 1 : start + r + count + 1] for r in range(REQUESTS)]
        hidden = torch.cat([states[r, start + r : start + r + count] for r in range(REQUESTS)])
        tokens, more = torch.tensor(following).flatten(), torch.zeros(padding, 64)
        tokens = torch.cat([tokens, torch.zeros(padding, dtype=torch.int64)])
        return mtp.forward(make_batch(start, count, padding), tokens, torch.cat([hidden, more]), cache)  # type: ignore

    with torch.inference_mode():
        for mtp in (plain.mtp, plain.with_ops(FlashGpu()).mtp):
            cache = allocate_cache(plain.config, PAGES, "float32", "cpu", mtp=True, requests=REQUESTS)
            run(plain.mtp, 0, first, 0)
            hidden, selection = run(mtp, first, size, 3)
            results.append((hidden[: REQUESTS * size], selection[: REQUESTS * size]))
    (expected, chosen), (found, selected) = results
    assert selected.equal(chosen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
