"""Weights out of nothing, on the device: random, well-scaled, and in the dtypes that the loader would hold.

Names, shapes and dtypes come from a load plan, made for the headers that a published FP8 checkpoint of this config
would have: the bench cannot disagree with the loader. 84 GB take seconds: codes are drawn once, 64 MB of them, and
every tensor gets windows of them from a place of its own. Knows no file. Next: rig.py.
"""

import math
from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor

from saccade.checkpoint.encoding import FP8_MODULES
from saccade.checkpoint.index import Entry, File, Index
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.checkpoint.write import E4M3_MAX
from saccade.errors import PlanError
from saccade.kernels.reference import dequantize
from saccade.kernels.types import SCALE_BLOCK
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import Extras, Kind, Layout
from saccade.models.registry import find_family
from saccade.plan import Plan, check, make_plan
from saccade.plan.problems import show_problems
from saccade.plan.types import DTYPE_BYTES, Stored
from saccade.weights.weights import Weights

TABLE = 64 << 20  # codes drawn once; a prime stride between windows keeps rows of two tensors from being equal
SMALL_TABLE = 1 << 20  # on a CPU
SPREAD = 96.0  # of the codes: the largest of 16,384 normal numbers is then about 400, of 448
STRIDE = 15_485_863  # prime


def write_headers(config: ModelConfig, mtp: bool = False) -> Index:
    """The Index of a checkpoint of this config in the published FP8 layout, without any file. `mtp`: with an MTP layer,
    which has the main embedding and head."""
    entries: dict[str, Entry] = {}
    at = 0

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal at
        stop = at + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = Entry(name, dtype, shape, "synthetic.safetensors", at, stop)
        at = stop

    family = find_family(config.model_type)
    for param in family.parameters(config, Layout(), Extras(mtp=mtp)):
        for part in param.parts:
            if part.source in entries:  # w_uk and w_uv share kv_b_proj
                continue
            module, _, leaf = part.source.rpartition(".")
            is_linear = leaf == "weight" and module.rpartition(".")[2] in FP8_MODULES
            if is_linear and not family.stays_plain(config, module):
                rows, columns = part.shape
                add(part.source, "F8_E4M3", part.shape)
                add(part.source + "_scale_inv", "F32", (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)))
            else:
                is_wide = leaf == "e_score_correction_bias" or module.endswith("k_norm")
                is_wide |= param.kind is Kind.F32_ONLY
                add(part.source, "F32" if is_wide else "BF16", part.shape)
    file = File("synthetic.safetensors", at, 0, len(entries))
    return Index("synthetic", (file,), entries, (), (), 0)


def plan_weights(config: ModelConfig, dtype: str = "auto", mtp: bool = False, layout: Layout = Layout()) -> Plan:
    """What a rank's loader would hold of such a checkpoint. PlanError if the plan is not complete."""
    plan = make_plan(config, write_headers(config, mtp), layout, dtype=dtype, mtp=mtp)
    problems = check(plan)
    if problems:
        raise PlanError(f"synthetic weights cannot be planned\n{show_problems(problems)}", tuple(problems))
    return plan


@torch.no_grad()
def make_weights(plan: Plan, device: torch.device | str, seed: int = 0) -> Weights:
    """Parameters of `plan` on `device`: y = x @ w.T of a normal x is again about normal, so that activations stay near
    1 through any number of layers, and the router's best experts differ from token to token. What every rank holds
    whole is the same on all of them; shares are drawn by each rank alone."""
    device = torch.device(device)
    dice = torch.Generator(device).manual_seed(seed)
    table = draw_codes(TABLE if device.type == "cuda" else SMALL_TABLE, dice)
    windows = place_windows(table.numel(), seed)
    shared = find_shared(plan)
    tensors: dict[str, Tensor] = {}
    for stored in plan.stored.values():
        if plan.layout.tp > 1:
            own = seed + (1 + plan.layout.rank) * (stored.name not in shared)
            dice.manual_seed(crc32(f"{own} {stored.name}".encode()))
            windows = place_windows(table.numel(), crc32(f"{own} {stored.name}".encode()))
        held = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device=device)
        if stored.encoding is not None:
            copy_windows(held.view(torch.uint8).view(-1), table, windows)
        elif stored.name.endswith(".scale"):
            held.copy_(draw_scales(held.shape, plan.stored[stored.name.removesuffix(".scale")].shape[-1], dice))
        else:
            fill_plain(held, stored, dice)
        tensors[stored.name] = held
    for name, held in tensors.items():
        if name.endswith("wk_weights_proj"):
            assert isinstance(plan.config, ModelConfig)
            if plan.layout.tp > 1:
                dice.manual_seed(crc32(f"{seed} {name} wk".encode()))
            store_as_fp8(held, plan.config.index_head_dim, dice)
    return Weights(tensors, kept=plan.stored)


def find_shared(plan: Plan) -> set[str]:
    """The tensors of a rank that all ranks hold whole."""
    assert isinstance(plan.config, ModelConfig)
    if plan.layout.tp == 1:
        return set(plan.stored)
    mtp = any(name.endswith("eh_proj") for name in plan.stored)
    whole = plan_weights(plan.config, plan.dtype, mtp).stored
    return {name for name, stored in plan.stored.items() if stored.shape == whole[name].shape}


def draw_codes(count: int, dice: torch.Generator) -> Tensor:
    """uint8 [count]: e4m3 codes of normal numbers; never NaN."""
    numbers = torch.randn(count, generator=dice, device=dice.device).mul_(SPREAD).clamp_(-E4M3_MAX, E4M3_MAX)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8)


def place_windows(size: int, seed: int) -> Iterator[int]:
    """Where one window after the other begins: multiples of 16 bytes, far apart."""
    at = seed
    while True:
        at += STRIDE
        yield at * 16 % size


def copy_windows(held: Tensor, table: Tensor, windows: Iterator[int]) -> None:
    """Fill the flat bytes of a tensor from the table, each run from another place of it."""
    at, size = 0, table.numel()
    while at < held.numel():
        start = next(windows)
        count = min(size - start, held.numel() - at)
        held[at : at + count].copy_(table[start : start + count])
        at += count


def draw_scales(shape: tuple[int, ...], columns: int, dice: torch.Generator) -> Tensor:
    """f32 powers of two, as DeepSeek's and GLM's scales are: per block one of two neighbours, mixed so that the weights
    have the standard deviation columns**-0.5."""
    wanted = columns**-0.5 / SPREAD
    low = 2.0 ** math.floor(math.log2(wanted))
    share = ((wanted / low) ** 2 - 1) / 3  # of the higher one: low^2 (1 - p) + 4 low^2 p = wanted^2
    count = math.prod(shape)
    dealt = torch.randperm(count, generator=dice, device=dice.device).view(shape)  # few blocks keep the share, too
    return low * (1 + (dealt < round(share * count)).float())


def fill_plain(held: Tensor, stored: Stored, dice: torch.Generator) -> None:
    """Norms near 1, biases near 0, embeddings of 1, matrices of columns**-0.5."""
    name = stored.name
    if name.endswith("bias"):
        held.normal_(0.0, 0.02, generator=dice)
    elif held.ndim == 1:
        held.normal_(1.0, 0.1, generator=dice)
    else:
        held.normal_(0.0, 1.0 if name.endswith("embed_tokens") else stored.shape[-1] ** -0.5, generator=dice)


def store_as_fp8(held: Tensor, rows: int, dice: torch.Generator) -> None:
    """Give the first rows of a BF16 matrix [n, k], the indexer's wk, numbers that FP8 blocks hold exactly: an
    arrangement that keeps them as codes then computes with the same weights."""
    codes = draw_codes(rows * held.shape[1], dice).view(torch.float8_e4m3fn).view(rows, -1)
    shape = (-(-rows // SCALE_BLOCK), -(-held.shape[1] // SCALE_BLOCK))
    held[:rows].copy_(dequantize(codes, draw_scales(shape, held.shape[1], dice), (SCALE_BLOCK, SCALE_BLOCK)))
