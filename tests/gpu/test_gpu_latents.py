"""Attention over FP8 latents on a CUDA device, at the shapes of a rank of eight of DeepSeek-V3.2.

Codes become BF16 numbers exactly, so kernels multiply the very numbers that the reference reads, and the bounds are
those of BF16 latents (test_kernels_attention.py): what queries and probabilities in two BF16 numbers lose. Guessed
without a GPU.
"""

import pytest
import torch
from paged_steps import Step
from torch import Tensor

from saccade import LLM
from saccade.kernels import PAGE, reference
from saccade.kernels.attention.dense import dense_attention
from saccade.kernels.attention.masked import masked_attention
from saccade.kernels.attention.sparse_decode import ATTEND_FEW, attend_values, sparse_attention
from saccade.kernels.attention.sparse_prefill import sparse_attention_of_many
from saccade.kernels.types import Selection

HEADS, NOPE, ROPE, V, LORA, TOPK = 16, 128, 64, 128, 512, 2048
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def choose(step: Step, topk: int) -> Selection:
    context = step.page_table.shape[1] * PAGE
    logits = step.normal(step.count, context)
    hidden = torch.arange(context, device=logits.device) > step.positions[:, None]
    return reference.select(logits.masked_fill(hidden, float("-inf")), step.positions, topk)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 2, 3, 8, 16, 32, 100, 256])
def test_attention_of_decodes(t: int) -> None:
    """Each kernel that may serve so many tokens, and the same bits four times."""
    step = Step([8192 - 37 * i % 4000 for i in range(t)], [1] * t, 8192 // PAGE)
    q, pool = step.normal(t, HEADS, LORA + ROPE) / 8, step.latents(LORA, ROPE, coded=True)
    where = step.page_table, step.request, choose(step, TOPK)
    right = reference.sparse_attention(q, pool, *where, 0.07, LORA)
    w_uv = step.normal(HEADS, V, LORA, dtype=torch.bfloat16) / 22
    values = torch.einsum("thc,hvc->thv", right, w_uv.float()).flatten(1)

    def few() -> Tensor:
        if t > 2:
            return attend_values(q, pool, *where, 0.07, w_uv)
        return attend_values(q, pool, *where, 0.07, w_uv, ATTEND_FEW).unflatten(0, (2, -1)).sum(0)

    runs = {"sparse_decode": lambda: sparse_attention(q, pool, *where, 0.07, LORA)}
    runs["sparse_prefill"] = lambda: sparse_attention_of_many(q, pool, *where, 0.07, LORA)
    for name, run in (runs | {"attend_values": few}).items():
        found, wanted = run(), values if name == "attend_values" else right
        print(f"{name}, {t} tokens: largest error {(found - wanted).abs().max():.1e}")
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert all(run().equal(found) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "tokens"), [([8192], [1024]), ([3000, 200, 5000], [700, 200, 1])])
def test_attention_of_prompts(lengths: list[int], tokens: list[int]) -> None:
    """Masked and gathered. Bounds of the first as in test_gpu_prompts.py."""
    step = Step(lengths, tokens, -(-max(lengths) // PAGE))
    q, rotation = step.normal(step.count, HEADS, NOPE + ROPE), step.rotation(ROPE)
    pool, selection = step.latents(LORA, ROPE, coded=True), choose(step, TOPK)
    w_uk, w_uv = (step.normal(HEADS, n, LORA, dtype=torch.bfloat16) / 22 for n in (NOPE, V))
    turned = reference.rotate(q[..., NOPE:], rotation, True)
    absorbed = torch.cat([torch.einsum("thn,hnc->thc", q[..., :NOPE].double(), w_uk.double()).float(), turned], 2)
    where = step.page_table, step.request, selection
    seen = reference.sparse_attention(absorbed, pool, *where, 0.07, LORA)
    wanted = torch.einsum("thc,hvc->thv", seen.double(), w_uv.double())
    length = torch.tensor(lengths, device=q.device)
    for activations, bound in (("exact", 3e-5), ("bf16", 8e-3)):
        first, again = (
            masked_attention(
                q, pool, step.page_table, length, step.request, step.positions, selection, w_uk, w_uv, rotation, 0.07,
                activations,
            )
            for _ in range(2)
        )  # fmt: skip
        off = float((first.double() - wanted).norm() / wanted.norm())
        print(f"{activations}: error {off:.1e}")
        assert off < bound and first.equal(again)
    found = sparse_attention_of_many(absorbed, pool, *where, 0.07, LORA)
    torch.testing.assert_close(found, seen, **CLOSE)
    assert found.equal(sparse_attention_of_many(absorbed, pool, *where, 0.07, LORA))


@pytest.mark.gpu
def test_attention_to_everything() -> None:
    step = Step([1000, 640, 70], [1000, 333, 70], 16)
    q, pool = step.normal(step.count, HEADS, LORA + ROPE) / 8, step.latents(LORA, ROPE, coded=True)
    everything = reference.select_all(step.positions, 1024)
    right = reference.sparse_attention(q, pool, step.page_table, step.request, everything, 0.07, LORA)
    found = dense_attention(q, pool, step.page_table, step.request, step.positions, 0.07, LORA)
    print(f"largest error {(found - right).abs().max():.1e}")
    torch.testing.assert_close(found, right, **CLOSE)
    assert found.equal(dense_attention(q, pool, step.page_table, step.request, step.positions, 0.07, LORA))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_log_probabilities_are_those_of_the_cpu(dtype: str) -> None:
    """A sum in another order may decide between two codes, 1/16 of a number, so the largest difference may be anything;
    half of the tokens are as near as with FP8 index keys."""
    exact = {"dtype": dtype, "latent_cache": "fp8", "activations": "exact"}
    cpu, gpu = (LLM(device=device, **exact) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    tokens = cpu.encode(
        "Anna has 12 pens. Tom gives her 5 more, and she loses 3. " * 8 + "How many pens does Anna have?"
    )
    difference = (torch.tensor(cpu.score(tokens)) - torch.tensor(gpu.score(tokens))).abs()
    print(f"{dtype}: log-probabilities differ by {difference.median():.1e}, at most {difference.max():.1e}")
    assert difference.median() < (1e-3 if dtype == "float32" else 5e-3)
