"""An encoder and a decoder of our own in numpy, and a writer of safetensors files: nothing here imports the product.

Tensors are raw bytes with a dtype and a shape. Random codes and scales are as good as encoded ones. `decode` computes
in float64, where every product of a code and its scales is exact, and rounds once to float32.
"""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from layouts import Layout, Rule, Stored, modules
from numpy.typing import NDArray

Array = NDArray[Any]


class Raw(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: Array  # of the dtype's own width: u1, u2, i1, i4, i8 or f4


def e4m3_values() -> Array:
    """By its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size)


def e2m1_values() -> Array:
    """Sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    code = np.arange(16)
    exponent, mantissa = code >> 1 & 3, code & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1.0))
    return np.where(code & 8, -size, size)


def bf16_bits(x: Array) -> Array:
    """float32 rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def floats(raw: Raw) -> Array:
    """float64 values of a tensor of plain numbers, or of scales: there, bytes and words are exponents."""
    if raw.dtype == "BF16":
        return (raw.data.astype("<u4") << 16).view("<f4").astype(np.float64)
    if raw.dtype == "F8_E4M3":
        return e4m3_values()[raw.data]
    if raw.dtype in ("U8", "F8_E8M0"):
        return 2.0 ** (raw.data.astype(np.float64) - 127)
    if raw.dtype == "I32":
        return 2.0 ** (np.ascontiguousarray(raw.data, "<i4").view("u1").astype(np.float64) - 127)
    return raw.data.astype(np.float64)


def numbers(code: str, raw: Raw, columns: int) -> Array:
    if code == "e4m3":
        return e4m3_values()[raw.data]
    if code == "int8":
        return raw.data.astype(np.float64)
    pairs = np.ascontiguousarray(raw.data).view("u1")
    nibbles = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1)[:, :columns].astype(np.int64)
    if code == "e2m1":
        return e2m1_values()[nibbles]
    return np.asarray(nibbles - 8 if code == "uint4" else (nibbles ^ 8) - 8, np.float64)


def decode(rule: Rule, tensors: dict[str, Raw], shape: tuple[int, int]) -> Array:
    """float32 [out, in] of one matrix: `tensors` by their last names, combined as the rule's `value` says."""
    code, *rest = rule.value.split()
    value = numbers(code, tensors[rule.tensors[0].leaf], shape[1])
    for operator, leaf in zip(rest[::2], rest[1::2], strict=True):
        stored = next(t for t in rule.tensors if t.leaf == leaf)
        scale = floats(tensors[leaf])
        steps = [int(dim.partition("/")[2] or 1) for dim in stored.dims]
        if stored.dtype == "I32":  # four exponents to a word
            steps[-1] //= 4
        at = [np.arange(n) // s % size for n, s, size in zip(shape, steps, scale.shape, strict=False)]
        if len(stored.dims) == 2:
            scale = scale[at[0][:, None], at[1]]
        elif stored.dims == ("out",):
            scale = scale[:, None]
        value = value / scale if operator == "/" else value * scale
    return value.astype(np.float32)


def random_tensor(t: Stored, shape: tuple[int, int], rule: Rule, dice: np.random.Generator) -> Raw:
    size = t.shape(*shape)
    if not rule.value:  # refused, so nobody reads them
        return Raw(t.dtype, size, dice.integers(0, 256, (*size, 2 if t.dtype == "F16" else 4), dtype=np.uint8))
    code = rule.value.split()[0]
    if t is rule.tensors[0]:
        width = {"I32": 4, "I8": 1}.get(t.dtype, 1)
        data = dice.integers(0, 256, (size[0], size[1] * width), dtype=np.uint8)
        if code == "e4m3":
            data[data & 127 == 127] = 5  # no NaN
        return Raw(t.dtype, size, data.view({"I32": "<i4", "I8": "i1"}.get(t.dtype, "u1")))
    if t.leaf == "weight_shape":
        return Raw(t.dtype, size, np.array(shape, "<i8"))
    if t.leaf == "weight_offset":
        return Raw(t.dtype, size, np.zeros(size, "<f4"))
    if t.dtype == "F8_E4M3":
        return Raw(t.dtype, size, dice.integers(0x10, 0x7F, size, dtype=np.uint8))
    if t.dtype in ("U8", "F8_E8M0"):
        return Raw(t.dtype, size, dice.integers(112, 127, size, dtype=np.uint8))
    if t.dtype == "I32":
        return Raw(t.dtype, size, dice.integers(112, 127, (size[0], size[1] * 4), dtype=np.uint8).view("<i4"))
    scale = 2.0 ** dice.uniform(-9, -3, size)
    if t.leaf == "weight_global_scale":
        scale = 1 / scale
    scale = np.asarray(scale, "<f4")
    return Raw(t.dtype, size, bf16_bits(scale).reshape(size) if t.dtype == "BF16" else scale)


class Made(NamedTuple):
    """A checkpoint in memory: what is stored, and what it means."""

    tensors: dict[str, Raw]
    values: dict[str, Array]  # float32, by the names of plain tensors


def make(layout: Layout, c: dict[str, Any], seed: int = 0) -> Made:
    dice = np.random.default_rng(seed)
    made = Made({}, {})
    for (name, dtype, shape), rule in modules(layout, c):
        if rule is None:
            number = dice.standard_normal(shape).astype("<f4")
            raw = Raw(dtype, shape, bf16_bits(number).reshape(shape) if dtype == "BF16" else number)
            made.tensors[name], made.values[name] = raw, floats(raw).astype("<f4")
            continue
        module = name.removesuffix("weight")
        stored = {t.leaf: random_tensor(t, (shape[0], shape[1]), rule, dice) for t in rule.tensors}
        made.tensors.update((module + leaf, raw) for leaf, raw in stored.items())
        if rule.value:
            made.values[name] = decode(rule, stored, (shape[0], shape[1]))
    return made


def write(root: Path, config: dict[str, Any], tensors: dict[str, Raw], shards: int = 3, seed: int = 0) -> Path:
    """config.json and safetensors files, their tensors in a random order, by the format's definition."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    names = list(np.random.default_rng(seed).permutation(sorted(tensors)))
    weight_map: dict[str, str] = {}
    for k in range(shards):
        header, chunks, at = {}, [], 0
        for name in map(str, names[k::shards]):
            raw = tensors[name]
            data = raw.data.tobytes()
            header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [at, at + len(data)]}
            chunks.append(data)
            at += len(data)
            weight_map[name] = f"model-{k}.safetensors"
        text = json.dumps(header).encode()
        (root / f"model-{k}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root
