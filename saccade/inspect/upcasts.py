"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Next: contents.py, which reports it for each layer; eval/indexers.py, which computes with these matrices.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.inspect.findings import Upcast
from saccade.kernels.codes import read_scale
from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import dequantize

BYTES_PER_NUMBER = 8  # of a wk, in memory at once: as stored, and again while its pieces are joined
ROWS = 16  # decoded at once: temporaries of 3 MB at 7,168 columns


def decode_rows(w: Matrix) -> Iterator[Tensor]:
    """f32 numbers, some rows at a time; the product of code and scale, rounded to fp32."""
    for place, rows in enumerate(w.data.split(ROWS)):
        if w.scale is None:
            yield rows.float()
        else:
            yield dequantize(rows, w.scale, w.group, (place * ROWS, 0), w.code, w.global_scale, w.divides)


def judge_upcast(name: str, stored: str, wk: Matrix) -> Upcast | None:
    """What a `wk`, stored as that, loses in BF16; None if it is not finite there, which is another finding."""
    rounding, least = 0.0, torch.finfo(torch.float32).tiny
    for exact in decode_rows(wk):
        held = exact.bfloat16().float()
        if not held.isfinite().all():
            return None
        rounding = max(rounding, float(((held - exact).abs() / exact.abs().clamp(min=least)).max()))
    if wk.scale is None:
        return Upcast(name, stored, None, None, 0, 0, False, rounding)
    scale = read_scale(wk.scale)
    mantissa, _ = torch.frexp(scale)
    return Upcast(
        name,
        stored,
        float(scale.min()),
        float(scale.max()),
        scale.shape[-1],
        len(scale.unique()),
        bool((mantissa == 0.5).all()),
        rounding,
    )
