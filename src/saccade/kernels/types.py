"""The values that pass between operations and kernels: matrices as they are stored, norms, angles, routing.

Tensors and numbers only: no layers, no requests, no files. Next: reference.py says what is computed with them.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

# The borders between token counts. Above one, other kernels are faster (ops/gpu.py is the table).
GEMV_TOKENS = 2  # each token has its own programs: memory is read once, the L2 cache twice. Above: tensor cores
# Attention of each token by several programs, whose sum is multiplied with w_uv in the same launch. Above, where
# sparse_prefill.py takes the shapes, the products with w_uv have a launch on tensor cores: of 16 heads on a Hopper 8
# tokens take 27 and 28 us, 10 tokens 36 and 32, 16 tokens 48 and 35. Else the border is DECODE_TOKENS.
ATTEND_TOKENS = 8
DECODE_TOKENS = 16  # index scores of few tokens; experts in other codes than BF16 and FP8 blocks: as PAIR_TOKENS
# Experts in BF16 or FP8 blocks: programs for each pair of token and expert. Above, and above DECODE_TOKENS for other
# codes: pairs sorted by expert, on tensor cores. 32 tokens take 281 us; sorted 277, and the shared expert beside.
PAIR_TOKENS = 32
# The same of FP8 blocks whose pairs are few (moe/few_pairs.py), with a shared expert of the same size: a layer of 20
# tokens takes 282 us, sorted 291; of 24, 308 and 306; of 32, 359 and 338.
TILE_TOKENS = 24
SPLIT_TOKENS = 64  # products: tokens are the columns of one tensor core product, and weights are read once
CAPTURED_TOKENS = 256  # of a step of one token a request, or of its drafts: no kernel or shape depends on numbers
# Of a captured step with prompts in it, and its tokens times positions of a page table. Their kernels depend on shapes
# alone, too. Launched one by one they keep the host 2.6 to 4.6 ms a layer, longer than those of 1,024 tokens take.
# Beyond, kernels take longer, and scores of 4 bytes each would fill a graph's memory.
MIXED_TOKENS, MIXED_SCORES = 4096, 1 << 27
# Attention of a prompt, in positions that a token of 16 heads passes by where keys and values are expanded: what a
# token costs whose rows are gathered (0.51 us against 38 ps in "exact" and 20.5 ps in BF16: chunks of 4,096 tokens at
# 32,768 positions on an H200, `python -m tools.kernel_bench.prompt attention`), and what it costs to expand a position.
GATHERED_POSITIONS = {"exact": 13500, "bf16": 25000, "fp8": 25000}
EXPANDED_POSITIONS = 600
SCALE_BLOCK = 128  # rows, and columns, that share a scale of FP8 codes in blocks


Selection = Tensor  # i32 [T, K] positions that a token may see, ascending, -1 padded at the end
# Expert ids (integers) and their weights f32, both [T, topk], best first. Ids count from 0 among this rank's experts;
# another rank's are -1, and have weight 0.
Chosen = tuple[Tensor, Tensor]


class Matrix(NamedTuple):
    """[..., rows, columns] weights; y = x @ weight.T. Leading axes, if any, count experts.

    This is all that a model knows of quantisation: it passes a Matrix to an operation, which looks at what it got.
    """

    data: Tensor  # bf16 or f32 numbers, or codes; several 4-bit codes of a row share an element
    scale: Tensor | None = None  # [..., ceil(rows / group[0]), ceil(columns / group[1])]; None for plain numbers
    group: tuple[int, int] = (128, 128)  # rows and columns that share one scale
    code: str = "e4m3"  # how a number is encoded: see codes.py
    global_scale: Tensor | None = None  # f32 [..., n, 1]: one for each of n equal runs of rows (gate and up have two)
    divides: bool = False  # by the global scale, which otherwise multiplies


class Mlp(NamedTuple):
    """down(silu(gate) * up)"""

    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]
    limit: float = inf  # gates are at most this, ups within it


class Norm(NamedTuple):
    """RMS norm: x / rms(x) * weight."""

    weight: Tensor  # f32 [k]
    eps: float


class KeyNorm(NamedTuple):
    """The LayerNorm of index keys, and how their first dimensions are rotated."""

    weight: Tensor  # f32 [dim]
    bias: Tensor  # f32 [dim]
    eps: float
    is_interleaved: bool


class Rotation(NamedTuple):
    """The rotary angles of a step's tokens, the same in every layer."""

    cos: Tensor  # f32 [T, rope / 2]
    sin: Tensor  # f32 [T, rope / 2]


class Routing(NamedTuple):
    """How tokens choose experts; see `choose_experts` in reference.py."""

    bias: Tensor  # f32 [experts]
    groups: int
    topk_groups: int
    topk: int
    scaling: float
    own: tuple[int, int] | None = None  # this rank's among the experts, first and last + 1; None: all of them


class Latents(NamedTuple):
    """A layer's pool of latents: numbers; or e4m3 codes with a power of two for each latent, and its rotated key, which
    stays in numbers. A BF16 number holds a code times a power of two exactly, so kernels see what reference.py sees."""

    data: Tensor  # numbers [pages * PAGE, kv_lora + rope], or codes [pages * PAGE, kv_lora]
    rope: Tensor | None = None  # beside codes: numbers [pages * PAGE, rope]; rope may be 0
    scales: Tensor | None = None  # beside codes: f32, one a latent

    @property
    def width(self) -> int:
        """kv_lora + rope."""
        return self.data.shape[1] + (0 if self.rope is None else self.rope.shape[1])

    @property
    def numbers(self) -> torch.dtype:
        """Of what is not codes, and of codes once they are decoded."""
        return self.data.dtype if self.rope is None else self.rope.dtype

    def is_contiguous(self) -> bool:
        """Whether rows of all pools lie side by side, as kernels take them."""
        return all(x is None or x.is_contiguous() for x in self)


class Parts(NamedTuple):
    """What programs that share a token's selection found of its attention. Each part is a mean over its rows, and
    counts as its `total` times 2^`most` does among those of the token; one without rows has a total of 0."""

    values: Tensor  # f32 [T, parts, heads, width]
    most: Tensor  # f32 [T, parts, heads]: the greatest score; not written where there is one part
    total: Tensor  # f32 [T, parts, heads]: the sum of the weights, beside 2^most; not written where there is one part


class IndexKeys(NamedTuple):
    """A layer's pool of index keys: numbers, or e4m3 codes with a power of two for each key."""

    data: Tensor  # [pages * PAGE / tokens that share a key, index_head_dim]
    scales: Tensor | None = None  # f32, one a key; None for plain numbers


class Pooling(NamedTuple):
    """How index keys of `size` tokens become one; kernels/indexer/pools.py."""

    size: int
    bias: Tensor  # f32 [size, dim]: of a place in the pool
    gate: Tensor  # f32 [T, dim]: of the step's tokens
    recent: Tensor  # f32 [places, ring, 2 * dim]: keys and gates of each request's latest tokens, by position


class StreamMixer(NamedTuple):
    """How a block reads residual streams and writes to them, found from the streams themselves; kernels/streams.py."""

    fn: Tensor  # f32 or bf16 [2 * streams + streams^2, streams * hidden]
    base: Tensor  # f32 [2 * streams + streams^2]
    scale: Tensor  # f32 [3]: of what is read, what is written, how streams are mixed
    streams: int
    iterations: int  # of Sinkhorn: columns and rows are made to sum to 1
    eps: float  # of mixing
    norm_eps: float


class CacheRows(NamedTuple):
    """What a layer leaves of a step's tokens in the cache, and where: latents, and index keys if there is a `key`."""

    kv_norm: Norm
    latent: Latents  # the pool
    key: Tensor | None = None  # f32 [T, dim], before its norm, rows may be strided; None where no key is kept
    key_norm: KeyNorm | None = None
    keys: IndexKeys | None = None  # the pool
    pooling: Pooling | None = None  # None: each token has an index key of its own
