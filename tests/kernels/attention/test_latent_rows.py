"""Rows of an FP8 latent cache: the codes, scales and rotated keys of kernels are the reference's, bit for bit."""

import pytest
import torch
from paged_steps import DEVICE
from tiny_models import page_table, step_batch
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.types import CacheRows, Latents, Matrix, Norm, Rotation
from saccade.ops.gpu import Gpu
from saccade.ops.interface import QueryWeights
from saccade.ops.reference import Reference
from saccade.ops.step import Batch, Cache, Step

LORA, LOW = 512, 64


def make_low(tokens: int, rope: int, random: torch.Generator) -> Tensor:
    """Inputs whose norms and angles round nothing, so that the order of a sum cannot decide between two codes: 192
    numbers of 1.5 and 320 of 0.5, squares 512 in all; small integers to be rotated."""
    signs = torch.randint(0, 2, (tokens, LORA), generator=random) * 2.0 - 1
    order = torch.rand(tokens, LORA, generator=random).argsort(1)
    latent = signs * torch.where(order < 192, 1.5, 0.5)
    turned = torch.randint(-8, 9, (tokens, rope), generator=random).float()
    return torch.cat([torch.randn(tokens, LOW, generator=random), latent, turned], 1).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("rope", [64, 0])
def test_rows_are_the_reference_s_bit_for_bit(tokens: int, rope: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    low, cos = make_low(tokens, rope, random), torch.full((tokens, rope // 2), 0.5, device=DEVICE)
    gain = torch.randn(LORA, generator=random) * torch.exp2(torch.randn(LORA, generator=random) * 3)
    norm = Norm(gain.to(DEVICE), 0.0)
    heads = torch.randn(2, 16, LORA, generator=random).to(DEVICE, torch.bfloat16)
    q_b = Matrix(torch.randn(2 * (16 + rope), LOW, generator=random).to(DEVICE, torch.bfloat16))
    w = QueryWeights(Norm(torch.ones(LOW, device=DEVICE), 1e-6), q_b, heads)
    plain = step_batch([(0, [0] * tokens, 0)], page_table([tokens]), 0)
    batch = Batch(**{name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in vars(plain).items()})
    pools = []
    for ops in (Reference(), Gpu()):
        rows = PAGE * (1 + int(batch.page_table.max()))
        codes = torch.zeros(rows, LORA, device=DEVICE).to(torch.float8_e4m3fn)
        pool = Latents(codes, torch.zeros(rows, rope, device=DEVICE).bfloat16(), torch.zeros(rows, device=DEVICE))
        step = Step(batch, Cache((pool,), ()), Rotation(cos, cos / 2), None)
        ops.make_queries(step, low, w, CacheRows(norm, pool))
        pools.append(pool)
    expected, found = pools
    assert expected.scales is not None and int((expected.scales > 0).sum()) == tokens
    assert found.data.view(torch.uint8).equal(expected.data.view(torch.uint8))
    for a, b in ((found.scales, expected.scales), (found.rope, expected.rope)):
        assert a is not None and b is not None and a.equal(b)
