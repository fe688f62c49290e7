"""The indexer's `wk` as it is stored, and what holding it in BF16 costs. One matrix at a time, 0.9 MB each.

Next: contents.py, which reports it for each layer; eval/indexers.py, which computes with these matrices.
"""

from torch import Tensor

from saccade.inspect.findings import Upcast
from saccade.kernels.codes import NIBBLES, read_scale
from saccade.kernels.reference import decode
from saccade.kernels.types import Matrix
from saccade.weights.dequantize import measure_rounding

BYTES_PER_NUMBER = 8  # of a wk, in memory at once: as stored, and again while its pieces are joined
DECODED_ROWS = 16  # decoded at once: temporaries of 3 MB at 7,168 columns


def judge_upcast(name: str, stored: str, wk: Matrix) -> Upcast | None:
    """What a `wk`, stored as that, loses in BF16; None if it is not finite there, which is another finding."""
    rounding = 0.0
    for place, rows in enumerate(wk.data.split(DECODED_ROWS)):
        exact = decode(wk._replace(data=rows), (place * DECODED_ROWS, 0))
        held = exact.bfloat16()
        if not held.isfinite().all():
            return None
        rounding = max(rounding, measure_rounding(exact, held))
    if wk.scale is None:
        return Upcast(name, stored, None, None, 0, 0, False, rounding)
    columns = wk.data.shape[1] * (wk.data.element_size() * 2 if wk.code in NIBBLES else 1)
    scale = read_scale(wk.scale)[:, : -(-columns // wk.group[1])]  # without what fills up a word
    is_power_of_two = _are_powers_of_two(scale)
    if wk.global_scale is not None:
        is_power_of_two &= _are_powers_of_two(wk.global_scale)
        scale = scale / wk.global_scale if wk.divides else scale * wk.global_scale
    return Upcast(
        name,
        stored,
        float(scale.min()),
        float(scale.max()),
        scale.shape[-1],
        len(scale.unique()),
        is_power_of_two,
        rounding,
    )


def _are_powers_of_two(scale: Tensor) -> bool:
    return bool((scale.frexp().mantissa == 0.5).all())
