"""A checkpoint out of tensors: the published FP8 layout, or whatever it is given. Used by tests and conversions.

Tensors are taken one at a time, so a checkpoint may be larger than memory. Files get their names only when they are
whole, index.json last: an interrupted write never looks complete. Knows no plan; what is written here is what index.py
and read.py read. The inverse of `quantize_blocks` is kernels/reference.py:dequantize.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.encoding import FP8_MODULES
from saccade.checkpoint.index import INDEX_FILE, SUFFIX
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.errors import CheckpointError

SPELLING = {dtype: name for name, dtype in TORCH_DTYPES.items()}
E4M3_MAX = 448.0
BF16_REACH = 3.3961774e38  # the largest F32 number that BF16 rounds to a finite one: just below 2^128 - 2^119
SLAB = 16  # blocks of rows quantised at once: temporaries of 60 MB at 7,168 columns, however high the matrix


def quantize_blocks(w: Tensor, power_of_two: bool = True, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """FP8 codes [rows, cols] and their F32 scales [ceil(rows / block[0]), ceil(cols / block[1])]; w ~ codes * scale.

    A scale is amax / 448, rounded up to a power of two unless told otherwise (DeepSeek's "ue8m0"), and 1 for a block
    of zeros. What codes stand for is finite in BF16: beyond 3.29e38, a code that would round up to 2^128 is rounded
    down. ValueError for NaN and infinity, which have no scale.
    """
    rows, cols = w.shape
    height, width = block
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // height), -(-cols // width))
    for top in range(0, rows, SLAB * height):
        slab = w[top : top + SLAB * height].float()
        padded = torch.nn.functional.pad(slab, (0, -cols % width, 0, -slab.shape[0] % height))
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        amax = blocks.abs().amax(dim=(1, 3))  # [row blocks, column blocks]
        if not amax.isfinite().all():
            raise ValueError("a matrix with NaN or infinity cannot be quantised")
        s = (amax / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # a smaller one would divide by zero
        if power_of_two:
            mantissa, exponent = torch.frexp(s)  # s = mantissa * 2^exponent, 0.5 <= mantissa < 1
            s = torch.ldexp(torch.ones_like(s), exponent - (mantissa == 0.5).int())
        s = torch.where(amax > 0, s, 1.0)
        scaled = blocks / s[:, None, :, None]  # at most 448: no code can overflow
        if amax.max() > BF16_REACH / 2:  # but a number can, when its code is decoded
            limit = round_down(BF16_REACH / s)[:, None, :, None]
            scaled = scaled.clamp(-limit, limit)
        scaled = scaled.view(padded.shape)
        codes[top : top + slab.shape[0]] = scaled[: slab.shape[0], :cols].to(codes.dtype)
        scale[top // height : top // height + s.shape[0]] = s
    return codes, scale


def round_down(x: Tensor) -> Tensor:
    """The largest e4m3 number that is not above each f32 number of at least 2^-6: 448 for all beyond."""
    return (x.view(torch.int32) & ~0xFFFFF).view(torch.float32).clamp(max=E4M3_MAX)  # 3 of 23 bits of the mantissa


def published_fp8(tensors: Iterable[tuple[str, Tensor]], power_of_two: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain DSA model in the published FP8 layout: X.weight as codes, then X.weight_scale_inv."""
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2 and module.rpartition(".")[2] in FP8_MODULES:
            codes, scale = quantize_blocks(tensor, power_of_two)
            yield name, codes
            yield name + "_scale_inv", scale
        else:
            yield name, tensor


class Written(NamedTuple):
    """A tensor whose bytes are in a shard's scratch file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Shard(NamedTuple):
    scratch: BinaryIO
    tensors: list[Written]


def write_checkpoint(
    directory: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shards: Callable[[str], int] | int = 1,
) -> None:
    """Write config.json and the tensors, as model.safetensors or as numbered shards with their index.json.

    `shards` is a number (each tensor goes to the shard that has the fewest bytes) or says, for a tensor's name, which
    shard it goes to; shards that get no tensor are not written. CheckpointError if the directory holds a checkpoint
    already, ValueError for a repeated name or a dtype that safetensors does not have.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if old := [p.name for p in folder.iterdir() if p.name == INDEX_FILE or p.suffix == SUFFIX]:
        raise CheckpointError(f"{folder}: holds {min(old)} already; write to an empty directory")
    open_shards: dict[int, Shard] = {}
    parts: list[Path] = []
    try:
        _spool(folder, tensors, shards, open_shards, parts)
        order = sorted(open_shards)
        names = [f"model-{k:05}-of-{len(order):05}{SUFFIX}" for k in range(1, len(order) + 1)]
        if len(order) == 1:
            names = [f"model{SUFFIX}"]
        weight_map: dict[str, str] = {}
        for key, name in zip(order, names, strict=True):
            parts.append(folder / f".{name}.part")
            with parts[-1].open("wb") as file:
                _assemble(open_shards[key], file)
            weight_map |= {t.name: name for t in open_shards[key].tensors}
        _write_json(folder, "config.json", config, parts)
        for name in names:
            os.replace(folder / f".{name}.part", folder / name)
        if len(names) > 1:
            total = sum(s.tensors[-1].stop for s in open_shards.values())
            listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder, INDEX_FILE, listing, parts)
    finally:
        for shard in open_shards.values():
            shard.scratch.close()
        for part in parts:
            part.unlink(missing_ok=True)


def _spool(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shards: Callable[[str], int] | int,
    open_shards: dict[int, Shard],
    parts: list[Path],
) -> None:
    """Append each tensor's bytes to its shard's scratch file: the header comes first in the final file, but is only
    known when the last tensor is."""
    seen: set[str] = set()
    sizes = dict.fromkeys(range(shards), 0) if isinstance(shards, int) else {}
    for name, tensor in tensors:
        if name in seen or tensor.dtype not in SPELLING:
            raise ValueError(
                f"{name}: " + ("given twice" if name in seen else f"{tensor.dtype} has no safetensors name")
            )
        seen.add(name)
        key = min(sizes, key=sizes.__getitem__) if isinstance(shards, int) else shards(name)
        if key not in open_shards:
            parts.append(folder / f".shard-{key}.part")
            open_shards[key] = Shard(parts[-1].open("w+b"), [])
        shard = open_shards[key]
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        start = shard.scratch.tell()
        shard.scratch.write(raw.numpy().data)
        shard.tensors.append(Written(name, tensor.dtype, tuple(tensor.shape), start, start + raw.numel()))
        sizes[key] = start + raw.numel()
    if not seen:
        raise ValueError("a checkpoint needs at least one tensor")


def _assemble(shard: Shard, file: BinaryIO) -> None:
    """The final file: wide dtypes first, so that every tensor lies on a multiple of its element size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(shard.tensors, key=lambda t: -t.dtype.itemsize)
    at = 0
    for t in ordered:
        size = t.stop - t.start
        header[t.name] = {"dtype": SPELLING[t.dtype], "shape": t.shape, "data_offsets": (at, at + size)}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for t in ordered:
        shard.scratch.seek(t.start)
        copy_bytes(shard.scratch, file, t.stop - t.start)


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, 8 << 20))
        target.write(chunk)
        count -= len(chunk)


def _write_json(folder: Path, name: str, value: dict[str, Any], parts: list[Path]) -> None:
    parts.append(folder / f".{name}.part")
    parts[-1].write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(parts[-1], folder / name)
