"""Positions of a request as rows of the pool, once for each: a gather looks them up in every thread that loads a part.

Next: attend.py, sparse.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.launch import begin, uses_pdl, wait
from saccade.kernels.reference import Selection

COLUMNS = 1024  # of a program


def find_rows(selection: Selection, page_table: Tensor, request: Tensor) -> Tensor:
    """i32 [T, K]: the pool row of each position of i32 [T, K]; -1 stays -1. A pool has fewer than 2^31 rows."""
    t, k = selection.shape
    assert selection.stride(1) == 1
    rows, pdl = torch.empty(t, k, dtype=torch.int32, device=selection.device), uses_pdl(selection)
    columns = min(COLUMNS, triton.next_power_of_2(k))
    _find_rows[t, triton.cdiv(k, columns)](
        selection, page_table, request, rows, k, selection.stride(0), page_table.stride(0), PAGE=PAGE, COLUMNS=columns,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return rows


@triton.jit
def _find_rows(
    selection, page_table, request, rows, k, stride, table_stride, PAGE: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    position = tl.load(selection + token * stride + column, mask=column < k, other=-1)
    table = page_table + tl.load(request + token) * table_stride
    page = tl.load(table + position // PAGE, mask=position >= 0, other=0).to(tl.int32)
    tl.store(rows + token * k + column, tl.where(position >= 0, page * PAGE + position % PAGE, -1), mask=column < k)
