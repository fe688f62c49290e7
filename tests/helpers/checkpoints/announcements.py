"""What a push announces of tensors."""

import torch
from torch import Tensor

from saccade.api.push import Announced

SPELLED = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def announce(tensors: dict[str, Tensor], **changes: tuple[str, tuple[int, ...]] | None) -> Announced:
    said = {name: (SPELLED[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return {name: spec for name, spec in (said | changes).items() if spec is not None}
