"""Tokens of requests of several lengths over shuffled pages, for kernels of the indexer and of attention."""

import torch

from saccade.kernels import reference
from saccade.kernels.types import Latents

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

    def latents(self, width, rope, dtype=torch.bfloat16, coded=False):
        """A pool of `width` + `rope` numbers a row; the first ones as codes beside the others, if `coded`."""
        rows = self.normal(self.pages * 64, width + rope, dtype=dtype)
        if not coded:
            return Latents(rows)
        codes = torch.empty(len(rows), width, dtype=torch.float8_e4m3fn, device=self.device)
        pool = Latents(codes, rows.new_empty(len(rows), rope), torch.empty(len(rows), device=self.device))
        rows = rows * torch.exp2(-self.normal(len(rows), 1, dtype=dtype).abs())  # scales of several sizes
        reference.write_latents(pool, torch.arange(len(rows), device=self.device), rows)
        return pool

    def rotation(self, rope):
        angle = self.normal(self.count, rope // 2)
        return reference.Rotation(angle.cos(), angle.sin())

    def where(self):
        return self.page_table, self.request, self.positions
