"""Random inputs and weights of products, and exact results to hold kernels against."""

import torch
from tiny_models import TinyWeights
from torch import Tensor

from saccade.checkpoint.write import quantize_blocks
from saccade.kernels import reference
from saccade.kernels.types import Matrix


def draw(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(rows: int, columns: int, seed: int = 1, power_of_two: bool = False) -> Matrix:
    """FP8 in blocks whose scales differ by 2^8 and are no powers of two."""
    spread = torch.exp2(
        torch.randint(-4, 5, (-(-rows // 128), -(-columns // 128)), generator=torch.Generator().manual_seed(seed))
    )
    spread = spread.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return Matrix(*quantize_blocks(draw(rows, columns, seed=seed) * spread * 0.1, power_of_two=power_of_two))


def exact(x: Tensor, w: Matrix | Tensor) -> Tensor:
    return x.double() @ reference.decode(w).double().transpose(-1, -2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def draw_choice(tokens: int, experts: int, topk: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(experts, generator=dice)[:topk] for _ in range(tokens)])
    return chosen, torch.rand(tokens, topk, generator=dice)


def widen(weights: TinyWeights) -> TinyWeights:
    """Codes with scales for 32 x 32 get scales for 128 x 128."""
    for name, w in weights.held.items():
        if isinstance(w, Matrix):
            flat = reference.decode(w).flatten(0, -3) if w.data.ndim == 3 else reference.decode(w)[None]
            pairs = [quantize_blocks(m, power_of_two=False) for m in flat]
            codes, scale = (torch.stack(t) if w.data.ndim == 3 else t[0] for t in zip(*pairs, strict=True))
            weights.held[name] = Matrix(codes, scale)
    return weights
