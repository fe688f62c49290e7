"""Every operation of the model in plain torch: the specification, on any device.

A faster kernel has the signature of its function here and a test that it equals it. Products are computed in fp32
and rounded once, to the dtype of the input. No shape depends on data and nothing is read back to the host, so a step
compiles whole and can be captured in a CUDA graph. Knows tensors only: no layers, no requests, no files.
Read `select` and `index_logits` first: they are what makes the attention sparse. Next: models/dsa/indexer.py.
"""

from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.codes import read_codes, read_scale
from saccade.kernels.types import SCALE_BLOCK, Chosen, Latents, Matrix, Rotation, Routing, Selection

GATHER_TILE = 16  # rows of one request, or of one expert, that share a gather
HEADS = 8  # indexer heads scored at once: bounds the scores in memory to 8 values per logit
LEAST_AMAX = 1e-4  # of a vector's largest number, before its scale is taken (DeepSeek-V3.2-Exp, kernel.py)
PREFILL_PARTS = (
    8  # parts of a prefill's attention: at T = 512 and K = 2048 one part gathers 302 MB, all would be 2.4 GB
)


# Weights.


def dequantize(
    codes: Tensor,
    scale: Tensor,
    group: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
    code: str = "e4m3",
    global_scale: Tensor | None = None,
    divides: bool = False,
) -> Tensor:
    """f32 [..., rows, columns] = codes * scale, the one place where a scale meets a code. A global scale multiplies
    or divides that product, which is exact for the codes that have one (e2m1, e4m3 scales): the result is rounded once.

    scale: [..., ceil(rows / group[0]), ceil(columns / group[1])]; the last groups may be ragged. global_scale: f32
    [..., n, 1] for n equal runs of rows. Leading axes count experts. To decode a box of a larger tensor, pass that
    tensor's whole scale and, as `origin`, the row and column at which the box begins in it.
    """
    numbers = read_codes(codes, code)
    rows, columns = numbers.shape[-2:]
    # Only the groups of these rows: all of a matrix with a scale for each row would be as large as its numbers.
    scale = read_scale(scale[..., origin[0] // group[0] : -(-(origin[0] + rows) // group[0]), :])
    scale = _spread(scale, -1, origin[1], columns, group[1])
    numbers.mul_(_spread(scale, -2, origin[0] % group[0], rows, group[0]))
    if global_scale is None:
        return numbers
    second = global_scale.repeat_interleave(numbers.shape[-2] // global_scale.shape[-2], -2)
    return numbers / second if divides else numbers * second


def _spread(scale: Tensor, dim: int, first: int, count: int, group: int) -> Tensor:
    """The scale of each of `count` numbers from `first` on; one alone where all share it."""
    low, high = first // group, -(-(first + count) // group)
    scale = scale.narrow(dim, low, high - low)
    if high - low == 1:
        return scale
    return scale.repeat_interleave(group, dim).narrow(dim, first - low * group, count)


def decode(w: Matrix | Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """The weights as f32 numbers, however they are stored. `origin`: as in `dequantize`."""
    if isinstance(w, Tensor):
        return w.float()
    if w.scale is None:
        return w.data.float()
    return dequantize(w.data, w.scale, w.group, origin, w.code, w.global_scale, w.divides)


def pick_experts(w: Matrix, experts: Tensor) -> Matrix:
    """The weights of `experts` [n], still encoded."""
    if w.scale is None:
        return Matrix(w.data[experts])
    second = None if w.global_scale is None else w.global_scale[experts]
    return Matrix(_pick(w.data, experts), _pick(w.scale, experts), w.group, w.code, second, w.divides)


def _pick(held: Tensor, items: Tensor) -> Tensor:
    return _as_bytes(held)[items].view(held.dtype)


def _as_bytes(held: Tensor) -> Tensor:
    """FP8 as bytes: not every device can index it."""
    return held.view(torch.uint8) if held.dtype.itemsize == 1 else held


def linear(x: Tensor, w: Matrix | Tensor, out_dtype: torch.dtype | None = None, activations: str = "exact") -> Tensor:
    """y [T, n] = x [T, k] @ w [n, k].T, accumulated in fp32, rounded once to `out_dtype` or x's dtype; of x as
    `round_inputs` leaves it.

    Or a batch of such products, w [B, n, k] over experts or heads, x [B, T, k].
    """
    weight, seen = decode(w), round_inputs(x, w, activations).float()
    y = F.linear(seen, weight) if weight.ndim == 2 else torch.bmm(seen, weight.transpose(1, 2))
    return y.to(out_dtype or x.dtype)


def round_inputs(x: Tensor, w: Matrix | Tensor, activations: str) -> Tensor:
    """x [..., k] as a product with w takes it: "exact" as it is; "fp8" beside FP8 blocks as 128 e4m3 codes times a
    power of two each, as DeepSeek's models were trained; else in BF16."""
    if activations == "exact":
        return x
    if activations == "fp8" and is_fp8_blocks(w):
        k = x.shape[-1]
        groups = F.pad(x.float(), [0, -k % SCALE_BLOCK]).unflatten(-1, (-1, SCALE_BLOCK))
        codes, scales = quantize_rows(groups)
        return (codes.float() * scales[..., None]).flatten(-2)[..., :k].to(x.dtype)
    return x.bfloat16().to(x.dtype)


def is_fp8_blocks(w: Matrix | Tensor) -> bool:
    """Whether products of FP8 codes serve it: e4m3, an f32 scale for 128 x 128."""
    if isinstance(w, Tensor) or w.scale is None or w.global_scale is not None:
        return False
    return w.code == "e4m3" and w.scale.dtype == torch.float32 and w.group == (SCALE_BLOCK, SCALE_BLOCK)


# Norms and rotary embedding, in fp32. A number above 1.8e19 has an infinite square, and one over the root of that is 0:
# what overflows would come out as a row of zeros, which is finite. The square times 0 makes it NaN.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    numbers = x.float()
    square = numbers.square().mean(-1, keepdim=True)
    return (numbers * (torch.rsqrt(square + eps) + square * 0) * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    numbers = x.float()
    y = F.layer_norm(numbers, weight.shape, weight.float(), bias.float(), eps)
    return (y + numbers.square().sum(-1, keepdim=True) * 0).to(x.dtype)


def rotate(x: Tensor, rotation: Rotation, interleaved: bool) -> Tensor:
    """Turn the pairs of x [T, ..., rope]: neighbours (0, 1), (2, 3) if interleaved, else (i, i + rope / 2)."""
    if not x.shape[-1]:  # a model without RoPE
        return x
    cos, sin = (a.view(a.shape[0], *[1] * (x.ndim - 2), a.shape[1]) for a in rotation)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


# The paged cache. A pool is [pages * PAGE, width]; one page table addresses every pool.


def write_rows(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """pool[slots] = rows. Padding (slot -1) lands in slot 0: page 0 belongs to nobody."""
    _as_bytes(pool).index_copy_(0, slots.clamp(min=0), _as_bytes(rows.to(pool.dtype)))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [..., D] and f32 scales [...] of vectors x [..., D]: one power of two each, the least with which the
    largest number stays within 448, 2^ceil(log2(amax / 448)), amax taken as LEAST_AMAX if less.

    448 is 1.75 * 2^8. Carrying a mantissa above 1.75 into the exponent rounds up exactly, on every device. Where a
    number is not finite, the scale is NaN, and so is the whole vector.
    """
    amax = x.float().abs().amax(-1).clamp(min=LEAST_AMAX)
    scales = (((amax.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - (8 << 23)).view(torch.float32)
    scales = torch.where(amax < inf, scales, float("nan"))
    return (x.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


def write_latents(pool: Latents, slots: Tensor, latent: Tensor) -> None:
    """pool[slots] = latent [T, kv_lora + rope]; into a pool of codes the kv_lora as `quantize_rows` has them.

    One scale for 512 numbers is as good as one for 128 of them: e4m3 is floating, so a scale moves numbers within its
    range and rounds none, until one is 10,000 times the others. (Latents of the bundled model are off by 2.6 % of their
    size either way; by 2.5 % with scales of any size, which would round once more in BF16.)
    """
    if pool.scales is not None and pool.rope is not None:
        latent, rope = latent.split([pool.data.shape[1], pool.rope.shape[1]], dim=-1)
        write_rows(pool.rope, slots, rope)
        latent, scales = quantize_rows(latent)
        write_rows(pool.scales, slots, scales)
    write_rows(pool.data, slots, latent)


def read_latents(pool: Latents, slots: Tensor | slice) -> Tensor:
    """f32 [..., kv_lora + rope]: latents at these rows of a pool; codes times their scales, which is exact."""
    if pool.scales is None or pool.rope is None:
        return pool.data[slots].float()
    codes = _as_bytes(pool.data)[slots].view(pool.data.dtype)
    return torch.cat([read_codes(codes) * pool.scales[slots][..., None], pool.rope[slots].float()], dim=-1)


def find_slots(page_table: Tensor, request: Tensor, positions: Tensor) -> Tensor:
    """The pool rows [T, K] that hold `positions` [T, K] of each token's request."""
    return page_table[request[:, None], positions // PAGE] * PAGE + positions % PAGE


# Tiles: rows that share something large, laid out so that it is gathered once per tile and not once per row.


class Tiles(NamedTuple):
    """A place for each of N rows in [tiles, size], where a tile holds rows of one group only."""

    tile_of_row: Tensor  # i64 [N]
    offset_of_row: Tensor  # i64 [N]
    group_of_tile: Tensor  # i64 [tiles]; an unused tile names any group
    size: int

    def spread(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [tiles, size, ...], zero where no row is."""
        tiled = rows.new_zeros(self.group_of_tile.shape[0], self.size, *rows.shape[1:])
        return tiled.index_put((self.tile_of_row, self.offset_of_row), rows)

    def collect(self, tiled: Tensor) -> Tensor:
        """[tiles, size, ...] -> [N, ...], the inverse of `spread`."""
        return tiled[self.tile_of_row, self.offset_of_row]


def tile_by(group: Tensor, n_groups: int, size: int) -> Tiles:
    """Lay N rows out in tiles of at most `size` rows of one group; rows of a group keep their order.

    The number of tiles, min(N, N // size + n_groups), is enough for any data and does not depend on it.
    """
    n = group.shape[0]
    row = torch.arange(n, device=group.device)
    count = torch.zeros(n_groups, dtype=torch.long, device=group.device).scatter_add(0, group, torch.ones_like(group))
    tiles = (count + size - 1) // size  # tiles of each group
    end = tiles.cumsum(0)
    order = group.argsort(stable=True)
    rank = torch.empty_like(row).scatter(0, order, row - (count.cumsum(0) - count)[group[order]])
    tile = torch.arange(min(n, n // size + n_groups), device=group.device)
    owner = torch.searchsorted(end, tile, right=True).clamp(max=n_groups - 1)
    return Tiles((end - tiles)[group] + rank // size, rank % size, owner, size)


# The lightning indexer.


def index_logits(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    page_table: Tensor,
    request: Tensor,
    positions: Tensor,
    key_scales: Tensor | None = None,
    page: int | None = None,
) -> Tensor:
    """f32 [T, S]: sum over heads of relu(q . k) * weight, -inf at positions after the token's own.

    q: [T, heads, D]; weights: f32 [T, heads]; keys: the pool of index keys, `page` of them a page (None: PAGE); S = P *
    page. The formula is DeepSeek's (V3.2-Exp report, equation 1). Each tile gathers its request's keys once, so long
    pieces have larger tiles: 512 tokens of two requests at S = 4096 hold 21 MB of keys in 10 tiles, not 71 in 34.

    With `key_scales`, f32 [pages * PAGE], keys are codes, and so is q, whose scales are part of `weights`: relu lets a
    positive factor through, and powers of two round nothing, so this is what decoded vectors give, bit for bit.
    """
    page = page or PAGE
    rows, requests = q.shape[0], page_table.shape[0]
    size = 1 if rows == requests else min(max(rows // requests, GATHER_TILE), 4 * GATHER_TILE)
    tiles = tile_by(request, requests, size)
    pages = page_table[tiles.group_of_tile]
    k = _pick(keys.unflatten(0, (-1, page)), pages).flatten(1, 2)  # [tiles, S, D]
    k = read_codes(k).transpose(1, 2)  # [tiles, D, S]
    q, weights = tiles.spread(read_codes(q)), tiles.spread(weights)  # [tiles, size, heads, D], [tiles, size, heads]
    logits = k.new_zeros(q.shape[0], q.shape[1], k.shape[2])
    for some_q, some_weights in zip(q.split(HEADS, 2), weights.split(HEADS, 2), strict=True):
        scores = torch.bmm(some_q.flatten(1, 2), k).relu_().unflatten(1, some_weights.shape[1:])
        logits += scores.mul_(some_weights[..., None]).sum(2)  # [tiles, size, S]
    if key_scales is not None:
        logits = logits * key_scales.unflatten(0, (-1, page))[pages].flatten(1, 2)[:, None]
    hidden = torch.arange(k.shape[2], device=q.device) > positions[:, None]
    return tiles.collect(logits).masked_fill(hidden, float("-inf"))


def select(logits: Tensor, positions: Tensor, k: int) -> Selection:
    """The k best of `logits` [T, S] among positions up to the token's own: i32 [T, min(k, S)].

    Exact, and the same on every device: of equal logits the lowest positions win (relu makes many exact zeros). Where
    one of them is NaN or infinite nobody knows which are best: nothing is selected, and attention over that is NaN.
    """
    k = min(k, logits.shape[1])
    position = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    best = logits.topk(k, dim=1).values  # NaN first
    least = torch.where(best[:, :1] < float("inf"), best[:, -1:], float("nan"))  # nothing is above or equal to NaN
    above = logits > least
    ties = (logits == least) & (position <= positions[:, None])
    taken = above | (ties & (ties.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
    column = torch.where(taken, taken.cumsum(1, dtype=torch.int32) - 1, k)  # column k takes what is left out
    chosen = torch.where(taken, position, -1)
    return chosen.new_full((logits.shape[0], k + 1), -1).scatter(1, column.long(), chosen)[:, :k]


def select_all(positions: Tensor, width: int) -> Selection:
    """Every position up to the token's own: what `select` returns when nothing can be left out."""
    position = torch.arange(width, device=positions.device, dtype=torch.int32)
    return torch.where(position <= positions[:, None], position, -1)


# Attention over the selection.


def sparse_attention(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int
) -> Tensor:
    """Absorbed MLA: [T, heads, width] = softmax(q . latent * scale) over the selection @ latent[:, :width].

    q: [T, heads, C]; latent: the pool of latents, C = kv_lora_rank + rope wide; width = kv_lora_rank. Over a selection
    of nothing it is NaN.
    """
    slots = find_slots(page_table, request, selection.long().clamp(min=0))  # [T, K]
    blocks = 1 if q.shape[0] == page_table.shape[0] else PREFILL_PARTS

    def attend(q: Tensor, slots: Tensor, selection: Selection) -> Tensor:
        seen = read_latents(latent, slots)  # [t, K, C]
        scores = torch.bmm(q.float(), seen.transpose(1, 2)) * scale  # [t, heads, K]
        scores = scores.masked_fill((selection < 0)[:, None], float("-inf"))
        return torch.bmm(scores.softmax(-1), seen[..., :width]).to(q.dtype)

    parts = zip(*(split_rows(x, blocks) for x in (q, slots, selection)), strict=True)
    return torch.cat([attend(*part) for part in parts])[: q.shape[0]]


def split_rows(x: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """x [T, ...] in a fixed number of equal parts, the last ones padded with zeros.

    A part has two rows at least, because torch.compile makes a graph of its own for a size of one.
    """
    rows = x.shape[0] // blocks + 2 if blocks > 1 else x.shape[0]
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, blocks * rows - x.shape[0]]).unflatten(0, (blocks, rows)).unbind(0)


# MLPs.


def silu_and_mul(gate_up: Tensor, limit: float = inf) -> Tensor:
    """[..., 2n] -> [..., n]: silu of the first half, at most `limit`, times the second, within it."""
    gate, up = gate_up.float().chunk(2, -1)
    if limit < inf:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gated_mlp(x: Tensor, gate_up: Matrix, down: Matrix, limit: float = inf, activations: str = "exact") -> Tensor:
    hidden = silu_and_mul(linear(x, gate_up, activations=activations), limit)
    return linear(hidden, down, activations=activations)


def choose_experts(logits: Tensor, routing: Routing) -> Chosen:
    """The experts of each token by the router's logits f32 [T, experts]: (i64 [T, topk], f32 weights), best first.

    `routing.bias` takes part in the choice only. Experts come in groups; a group counts as the sum of its best two, and
    only the best `topk_groups` groups may be chosen from (DeepSeek-V3 report, section 2.1.2, "noaux_tc"). Where a score
    or a bias is not finite, whether its expert is chosen or not, all weights are NaN. Of many ranks each chooses among
    all experts, and keeps its own (see `Chosen`).
    """
    scores = logits.sigmoid()  # [T, experts]
    choice = (scores + routing.bias).unflatten(1, (routing.groups, -1))  # [T, groups, experts / groups]
    worth = choice.topk(min(2, choice.shape[2]), dim=2).values.sum(2)
    closed = torch.ones_like(worth, dtype=torch.bool).scatter(1, worth.topk(routing.topk_groups, dim=1).indices, False)
    experts = choice.masked_fill(closed[..., None], float("-inf")).flatten(1).topk(routing.topk, dim=1).indices
    weights = scores.gather(1, experts) + (choice * 0).sum((1, 2))[:, None]
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * routing.scaling
    if routing.own is None:
        return experts, weights
    is_own = (experts >= routing.own[0]) & (experts < routing.own[1])
    return torch.where(is_own, experts - routing.own[0], -1), torch.where(is_own, weights, 0.0)


def expert_mlp(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, limit: float = inf,
    activations: str = "exact",
) -> Tensor:  # fmt: skip
    """[T, hidden]: the sum over a token's experts of weight * mlp(x), always in the order of `experts` [T, topk]. An
    id of -1 adds nothing: that expert is another rank's.

    gate_up: [E, 2n, hidden]; down: [E, hidden, n]. Token-expert pairs are tiled by expert, so that each tile gathers
    and decodes its expert's weights once. Tiles grow with the rows that an expert has on average: with 8 experts, 1,024
    tokens need 24 decoded matrices instead of 136.
    """
    n_experts = gate_up.data.shape[0]
    rows = experts.shape[0] * experts.shape[1] // n_experts
    tiles = tile_by(experts.flatten().clamp(min=0), n_experts, min(max(rows, GATHER_TILE), 8 * GATHER_TILE))
    pairs = x[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)  # [T * topk, hidden]
    y = gated_mlp(
        tiles.spread(pairs),
        pick_experts(gate_up, tiles.group_of_tile),
        pick_experts(down, tiles.group_of_tile),
        limit,
        activations,
    )
    y = tiles.collect(y).unflatten(0, experts.shape)  # [T, topk, hidden]
    return (y.float() * weights[..., None]).masked_fill(experts[..., None] < 0, 0).sum(1).to(x.dtype)
