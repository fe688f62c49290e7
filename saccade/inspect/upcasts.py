"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Next: contents.py, which reports it for each layer; eval/indexers.py, which computes with these matrices.
"""

import torch

from saccade.decode import measure_rounding
from saccade.inspect.findings import Upcast
from saccade.kernels.codes import read_scale
from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import decode

BYTES_PER_NUMBER = 8  # of a wk, in memory at once: as stored, and again while its pieces are joined
ROWS = 16  # decoded at once: temporaries of 3 MB at 7,168 columns


def judge_upcast(name: str, stored: str, wk: Matrix) -> Upcast | None:
    """What a `wk`, stored as that, loses in BF16; None if it is not finite there, which is another finding."""
    rounding = 0.0
    for place, rows in enumerate(wk.data.split(ROWS)):
        exact = decode(wk._replace(data=rows), (place * ROWS, 0))
        held = exact.bfloat16()
        if not held.isfinite().all():
            return None
        rounding = max(rounding, measure_rounding(exact, held))
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
