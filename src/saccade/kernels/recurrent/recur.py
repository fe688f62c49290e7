"""Which kernels run Kimi delta attention, by the numbers of tokens and requests: shapes, which a captured step keeps.

| step | kernels |
|---|---|
| at most FEW_TOKENS, or as many a request as may be taken back | gates, tokens |
| more | gates, tokens for what is pending and for short requests, chunks for the others |
| more, and decays stronger than chunks take | gates, tokens |

No number is read back: which of a step's requests are long, the kernels see for themselves. Gates whose matrices are
codes are products of their own. The specification is `FlashReference.recur` in models/glm5_next/operations.py. Next:
gates.py, tokens.py, chunks.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.kernels.recurrent.chunks import can_be_chunked, run_chunks
from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights, find_decay
from saccade.kernels.recurrent.gates import Gates, find_gates, has_gates
from saccade.kernels.recurrent.tokens import Where, count_counters, run_tokens
from saccade.kernels.types import Matrix, Norm

FEW_TOKENS = 64  # of a step: one after the other they take about as long as a chunk's three launches. An estimate


def run_recurrence(
    qkv: Tensor, beta: Tensor, forget: Tensor, gate: Tensor, f_b: Matrix, g_b: Matrix, delta: DeltaWeights, norm: Norm,
    state: DeltaState, where: Where, multiply: Callable[[Tensor, Matrix], Tensor],
) -> Tensor:  # fmt: skip
    """f32 [T, heads * dim] behind norm and output gate; each request's state goes on. Heads are as `fits_kernels` says.

    qkv, beta, forget, gate: views of the rows of one product; the last three before sigmoids, of the low ranks of decay
    and output gate. multiply: x @ w.T, for matrices that are stored as codes.
    """
    tokens, requests = len(qkv), len(where.places)
    counters = count_counters(requests, delta)
    if has_gates(f_b, g_b):
        gates = find_gates(forget, gate, beta, f_b, g_b, delta, where.query_start, counters)
    else:
        decays = find_decay(multiply(forget, f_b), delta).flatten(1)
        counted = torch.zeros(counters, dtype=torch.int32, device=qkv.device)
        gates = Gates(decays, beta.sigmoid(), multiply(gate, g_b), torch.zeros_like(decays), counted)
    taken_back = state.recent.shape[1] - delta.conv.shape[1] + 1
    is_short = tokens <= max(FEW_TOKENS, requests * taken_back) or not can_be_chunked(delta)
    run_tokens(qkv, gates, delta, norm, state, where, normalizes=is_short)
    if not is_short:
        run_chunks(qkv, gates, delta, norm, state, where)
    return gates.out
