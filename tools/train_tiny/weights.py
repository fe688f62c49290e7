"""Weights while they are trained: fp32 numbers by their published names, the experts of a layer stacked.

`prepare` makes of them what a forward pass computes with: bf16, and late in training what the published FP8 layout
would hold, with gradients passing straight through the rounding. Knows no loss. Next: optimizer.py, export.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from saccade.checkpoint.encoding import FP8_MODULES
from saccade.checkpoint.write import E4M3_MAX
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.parameters import parameters
from saccade.models.parameters import Extras
from saccade.plan import Layout

BLOCK = 128
FIXED = "e_score_correction_bias"  # moved by the load of the experts, not by a gradient
F32 = (FIXED, "k_norm.weight", "k_norm.bias")  # all else is BF16 or FP8
STACKS = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}


def list_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, MTP layer included, in the order of a forward pass."""
    return {part.source: part.shape for param in parameters(c, Layout(), Extras(mtp=True)) for part in param.parts}


def draw_weights(c: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The first weights. What writes into the residual stream starts at zero."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in list_shapes(c).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        elif len(shape) == 1 or name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros(shape)
        else:
            spread = {"model.embed_tokens.weight": 0.5, "lm_head.weight": 0.02}.get(name, 0.6 * shape[1] ** -0.5)
            tensors[name] = torch.randn(shape, generator=dice) * spread
    return stack_experts(c, tensors)


def stack_experts(c: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[E, 2n, hidden] and [E, hidden, n] in place of each expert's own matrices."""
    stacked = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in range(c.num_hidden_layers + 1):
        if c.is_sparse(layer):
            p = f"model.layers.{layer}.mlp."
            for name, parts in STACKS.items():
                each = [[tensors[f"{p}experts.{e}.{m}.weight"] for m in parts] for e in range(c.n_routed_experts)]
                stacked[p + name] = torch.stack([torch.cat(matrices) for matrices in each])
    return stacked


def unstack_experts(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The inverse: every tensor under its published name."""
    for name, w in weights.items():
        stack = next((s for s in STACKS if name.endswith(s)), None)
        if stack is None:
            yield name, w
            continue
        p = name.removesuffix(stack)
        for e, expert in enumerate(w.unbind(0)):
            for module, matrix in zip(STACKS[stack], expert.chunk(len(STACKS[stack])), strict=True):
                yield f"{p}experts.{e}.{module}.weight", matrix


def is_fp8(name: str) -> bool:
    """Whether the published layout holds this matrix (or stack) in FP8."""
    return name.endswith(tuple(STACKS)) or name.removesuffix(".weight").rpartition(".")[2] in FP8_MODULES


def is_matrix(name: str, w: Tensor) -> bool:
    """Whether Muon trains it: a map between hidden spaces, not a table, a router or a vector."""
    return w.ndim >= 2 and not name.endswith(
        ("embed_tokens.weight", "lm_head.weight", "gate.weight", "weights_proj.weight")
    )


def is_writer(name: str) -> bool:
    """Whether a matrix's rows are channels of the residual stream."""
    return name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))


def group_by_shape(weights: Mapping[str, Tensor], names: Iterable[str]) -> list[list[str]]:
    """Names whose tensors have equal last two axes: one kernel serves a group where each tensor would need its own."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in names:
        groups[tuple(weights[name].shape[-2:])].append(name)
    return list(groups.values())


def stack(tensors: Iterable[Tensor]) -> Tensor:
    """Matrices and stacks of matrices as one stack [n, rows, columns]."""
    return torch.cat([t if t.ndim == 3 else t[None] for t in tensors])


def unstack(stacked: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """The inverse of `stack`."""
    like = list(like)
    parts = stacked.split([t.shape[0] if t.ndim == 3 else 1 for t in like])
    return [part if t.ndim == 3 else part[0] for part, t in zip(parts, like, strict=True)]


def round_to_fp8(w: Tensor) -> Tensor:
    """What is left of w [..., rows, columns] after FP8 e4m3 with a power-of-two scale a 128x128 block: the numbers
    that `quantize_blocks` in saccade/checkpoint/write.py stores. A test holds the two together."""
    rows, columns = w.shape[-2:]
    padded = torch.nn.functional.pad(w, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R, 128, C, 128]
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)
    exponent = exponent - (mantissa == 0.5).int()
    scale = torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), exponent), 1.0)
    rounded = (blocks / scale).to(torch.float8_e4m3fn).to(w.dtype) * scale
    return rounded.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def prepare(weights: Mapping[str, Tensor], dtype: torch.dtype, fp8: bool) -> dict[str, Tensor]:
    """The weights in `dtype`, those that are published in FP8 rounded to it first if `fp8`; gradients pass unchanged.

    What the published layout holds in F32 stays so.
    """
    ready = {name: w if name.endswith(F32) else w.to(dtype) for name, w in weights.items() if w.ndim < 2}
    tables = [name for name, w in weights.items() if w.ndim >= 2]
    for names in group_by_shape(weights, tables):
        for codes in (True, False):
            some = [name for name in names if is_fp8(name) is codes]
            if not some:
                continue
            whole = stack(weights[name] for name in some)
            if codes and fp8:
                whole = whole + (round_to_fp8(whole.detach()) - whole.detach())
            ready |= zip(some, unstack(whole.to(dtype), (weights[name] for name in some)), strict=True)
    return ready
