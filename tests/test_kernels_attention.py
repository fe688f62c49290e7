"""Kernels of the indexer and of sparse attention against reference.py: in the interpreter, or on a GPU."""

import pytest
import torch

from saccade.kernels import reference
from saccade.kernels.score import index_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_LIFE = 1e-4


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
