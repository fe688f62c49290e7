"""What a checkpoint's parameters must be, told from its bytes alone: the safetensors library reads, numpy decodes.

Written from the survey of published layouts; it uses no plan, no table of encodings and no torch, so that fuzzing can
compare what was loaded with something independent. `expected` gives each parameter's numbers; `Unclear` means that
the files leave open what is meant, so that nothing may be loaded from them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

Array = NDArray[np.float32]

INTS = {"I8": "<i1", "U8": "<u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8"}
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
SCALES = ("_scale_inv", "_scale")
INDEX = "model.safetensors.index.json"


class Unclear(Exception):
    """The files do not say what this tensor's numbers are."""


class Raw(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def e4m3() -> Array:
    """The 256 values of F8_E4M3: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


E4M3 = e4m3()
E8M0 = np.array([*(2.0 ** (b - 127.0) for b in range(255)), np.nan]).astype(np.float32)
INT4 = np.array([*range(8), *range(-8, 0)], np.float32)  # two's complement
UINT4 = np.arange(-8, 8).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def numbers(raw: Raw) -> Array:
    """A tensor's own numbers as f32; a byte of U8 in place of a scale is an exponent (E8M0)."""
    if raw.dtype == "BF16":
        flat = (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif raw.dtype == "F8_E4M3":
        flat = E4M3[np.frombuffer(raw.data, np.uint8)]
    elif raw.dtype in ("F8_E8M0", "U8"):
        flat = E8M0[np.frombuffer(raw.data, np.uint8)]
    elif raw.dtype == "I32" and raw.shape:  # four exponents a word, the first in the lowest bits
        return E8M0[np.frombuffer(raw.data, np.uint8)].reshape(*raw.shape[:-1], 4 * raw.shape[-1])
    elif raw.dtype in FLOATS or raw.dtype == "I8":
        flat = np.frombuffer(raw.data, FLOATS.get(raw.dtype, "<i1")).astype(np.float32)
    else:
        raise Unclear(f"{raw.dtype} numbers")
    return flat.reshape(raw.shape)


def codes_of(raw: Raw) -> NDArray[np.uint8]:
    return np.frombuffer(raw.data, np.uint8).reshape(raw.shape[0], -1)


def nibbles(raw: Raw) -> NDArray[np.uint8]:
    """Two codes a byte, the low one first; of a word, its lowest byte first. [rows, columns]"""
    packed = np.frombuffer(raw.data, np.uint8).reshape(raw.shape[0], -1)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(raw.shape[0], -1)


def spread(scale: Array, shape: tuple[int, int]) -> Array:
    """A scale of any published shape, repeated to the [rows, columns] that it is for."""
    rows, columns = shape
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), shape)
    if scale.shape == (rows,):
        scale = scale[:, None]
    blocks = (-(-rows // 128), -(-columns // 128))
    for grouped, group in (
        (blocks, (128, 128)), ((rows, 1), (1, columns)), ((rows, -(-columns // 32)), (1, 32)),
        ((rows, -(-columns // 16)), (1, 16)), ((rows, -(-columns // 128)), (1, 128)),
    ):  # fmt: skip
        if scale.shape == grouped:
            return scale.repeat(group[0], 0)[:rows].repeat(group[1], 1)[:, :columns]
    raise Unclear(f"a scale of shape {scale.shape} for {shape}")


class Files:
    """The tensors of a directory by name, and which of them were asked for."""

    def __init__(self, root: Path):
        self.by_file: dict[str, dict[str, Raw]] = {}
        for path in sorted(root.glob("[!.]*.safetensors")):
            try:
                found = deserialize(path.read_bytes())
            except SafetensorError as e:
                raise Unclear(f"{path.name}: {e}") from None
            self.by_file[path.name] = {n: Raw(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in found}
        listing = root / INDEX
        self.where: dict[str, str] = json.loads(listing.read_bytes())["weight_map"] if listing.exists() else {}
        for name, file in self.where.items():
            if name not in self.by_file.get(file, {}):
                raise Unclear(f"{name} is not in {file}, where index.json says that it is")
        self.asked: set[str] = set()

    def names(self) -> set[str]:
        """All names of the checkpoint; a file whose names index.json has elsewhere is a copy, not part of it."""
        return {name for tensors in self.by_file.values() for name in tensors}

    def get(self, name: str) -> Raw | None:
        holders = [file for file, tensors in self.by_file.items() if name in tensors]
        if name in self.where:
            holders = [self.where[name]]
        if len(holders) > 1:
            raise Unclear(f"{name} is in {holders}")
        if not holders:
            return None
        self.asked.add(name)
        return self.by_file[holders[0]][name]

    def must(self, name: str) -> Raw:
        raw = self.get(name)
        if raw is None:
            raise Unclear(f"{name} is not there")
        return raw

    def vector(self, name: str, length: int) -> Array:
        raw = self.must(name)
        if raw.dtype not in ("BF16", "F16", "F32") or raw.shape != (length,):
            raise Unclear(f"{name} is {raw.dtype} {raw.shape}")
        return numbers(raw)

    def scale(self, name: str) -> Raw:
        found = [raw for suffix in SCALES if (raw := self.get(name + suffix)) is not None]
        if len(found) != 1:
            raise Unclear(f"{name} has {len(found)} scales")
        return found[0]

    def matrix(self, name: str, shape: tuple[int, int]) -> Array:
        """f32 [rows, columns]: plain numbers, or the fp32 product of codes and scales, rounded once."""
        raw = self.get(name)
        if raw is None:
            return self.packed(name, shape)
        if raw.dtype == "U8" or (raw.dtype == "I8" and raw.shape == (shape[0], shape[1] // 2)):
            return self.four_bits(name, raw, shape)
        if raw.shape != shape:
            raise Unclear(f"{name} is {raw.shape}, expected {shape}")
        if raw.dtype in ("BF16", "F16", "F32"):
            return numbers(raw)
        if raw.dtype not in ("F8_E4M3", "I8"):
            raise Unclear(f"{name} is {raw.dtype}")
        offset = self.get(name + "_offset")
        if offset is not None and (raw.dtype != "I8" or numbers(offset).any()):
            raise Unclear(f"{name} has an offset")
        scale = self.scale(name)
        grid = numbers(scale)
        if scale.dtype == "I32":  # the last word may be filled up
            grid = grid[:, : -(-shape[1] // 128)]
        return times(numbers(raw), spread(grid, shape))

    def packed(self, name: str, shape: tuple[int, int]) -> Array:
        """compressed-tensors: X.weight_packed holds 4-bit codes, 8 a word (INT4) or 2 a byte."""
        raw = self.must(name + "_packed")
        self.asked.add(name + "_shape")  # says what the codes' shape says
        if raw.dtype == "U8":
            return self.four_bits(name, raw, shape)
        if raw.dtype != "I32" or (raw.shape[0], 8 * raw.shape[1]) != shape:
            raise Unclear(f"{name}_packed is {raw.dtype} {raw.shape}")
        return times(UINT4[nibbles(raw)], spread(numbers(self.scale(name)), shape))

    def four_bits(self, name: str, raw: Raw, shape: tuple[int, int]) -> Array:
        """Two codes a byte: INT4 with a scale per 128, MXFP4 with E8M0 per 32, or NVFP4: E4M3 per 16 and a global one,
        by which ModelOpt multiplies and compressed-tensors divides."""
        if (raw.shape[0], 2 * raw.shape[1]) != shape:
            raise Unclear(f"{name} is packed {raw.shape}, expected {shape}")
        scale = self.scale(name)
        grid = numbers(scale)
        if raw.dtype == "I8":
            return times(INT4[nibbles(raw)], spread(grid, shape))
        values = times(E2M1[nibbles(raw)], spread(grid, shape))  # 9 bits: exact
        by, per = self.get(name + "_scale_2"), self.get(name + "_global_scale")
        if (scale.dtype == "F8_E4M3") != ((by is None) != (per is None)) or (by and per):
            raise Unclear(
                f"{name} has a scale of {scale.dtype} and global scales {by and by.shape}, {per and per.shape}"
            )
        if by is not None:
            return times(values, numbers(by).reshape(1, 1))
        with np.errstate(all="ignore"):
            return values if per is None else values / numbers(per).reshape(1, 1)


def times(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):  # a mutant may say 0 * infinity
        return a * b


class Want(NamedTuple):
    """A parameter: its numbers, and for a matrix that may stay as codes, the tensors stacked in it (for experts, a
    list of lists)."""

    name: str
    values: Array
    is_f32: bool
    sources: list[list[str]] | None = None


def expected(c: dict, files: Files, full: set[int], sparse: set[int], mtp: bool) -> Iterator[Want]:
    """Every parameter of the model that config.json `c` describes; `full` are the layers that have an indexer."""
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]

    def stacked(name: str, *sources: tuple[str, int, int]) -> Want:
        parts = [files.matrix(f"{n}.weight", (rows, columns)) for n, rows, columns in sources]
        return Want(name, np.concatenate(parts), False, [[f"{n}.weight" for n, _, _ in sources]])

    def vector(name: str, length: int) -> Want:
        return Want(name, files.vector(name, length), True)

    def mlp(x: str, width: int) -> Iterator[Want]:
        yield stacked(x + "gate_up_proj", (x + "gate_proj", width, hidden), (x + "up_proj", width, hidden))
        yield stacked(x + "down_proj", (x + "down_proj", hidden, width))

    def moe(x: str) -> Iterator[Want]:
        experts, width = range(c["n_routed_experts"]), c["moe_intermediate_size"]
        gate = x + "gate.weight"
        gate_values = files.matrix(gate, (len(experts), hidden))
        yield Want(x + "gate", gate_values, files.must(gate).dtype != "BF16")
        yield vector(x + "gate.e_score_correction_bias", len(experts))
        for name, kinds, shape in (
            ("gate_up_proj", ("gate_proj", "up_proj"), (width, hidden)),
            ("down_proj", ("down_proj",), (hidden, width)),
        ):
            sources = [[f"{x}experts.{e}.{kind}.weight" for kind in kinds] for e in experts]
            values = np.stack([np.concatenate([files.matrix(s, shape) for s in row]) for row in sources])
            yield Want(f"{x}experts.{name}", values, False, sources)
        yield from mlp(x + "shared_experts.", width * c["n_shared_experts"])

    def block(layer: int) -> Iterator[Want]:
        x, a = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        heads, q_rank, rank = c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
        nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        yield vector(x + "input_layernorm.weight", hidden)
        yield vector(x + "post_attention_layernorm.weight", hidden)
        yield vector(a + "q_a_layernorm.weight", q_rank)
        yield vector(a + "kv_a_layernorm.weight", rank)
        kv_a = (a + "kv_a_proj_with_mqa", rank + rope, hidden)
        yield stacked(a + "qkv_a_proj", (a + "q_a_proj", q_rank, hidden), kv_a)
        yield stacked(a + "q_b_proj", (a + "q_b_proj", heads * (nope + rope), q_rank))
        kv_b = files.matrix(a + "kv_b_proj.weight", (heads * (nope + v), rank)).reshape(heads, nope + v, rank)
        yield Want(a + "w_uk", kv_b[:, :nope], False)
        yield Want(a + "w_uv", kv_b[:, nope:], False)
        yield stacked(a + "o_proj", (a + "o_proj", hidden, heads * v))
        if layer in full:
            i, n, size = a + "indexer.", c["index_n_heads"], c["index_head_dim"]
            yield stacked(i + "wq_b", (i + "wq_b", n * size, q_rank))
            fused = stacked(i + "wk_weights_proj", (i + "wk", size, hidden), (i + "weights_proj", n, hidden))
            yield fused._replace(sources=None)  # BF16 whatever the files hold
            yield vector(i + "k_norm.weight", size)
            yield vector(i + "k_norm.bias", size)
        yield from moe(x + "mlp.") if layer in sparse else mlp(x + "mlp.", c["intermediate_size"])

    def vocabulary(name: str) -> Want:
        return stacked(name, (name, c["vocab_size"], hidden))

    yield vocabulary("model.embed_tokens")._replace(sources=None)
    yield vector("model.norm.weight", hidden)
    yield vocabulary("lm_head")
    for layer in range(layers):
        yield from block(layer)
    if not mtp:
        return
    x = f"model.layers.{layers}."
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield vector(f"{x}{norm}.weight", hidden)
    yield stacked(x + "eh_proj", (x + "eh_proj", hidden, 2 * hidden))
    yield from block(layers)
    if x + "embed_tokens.weight" in files.names():
        yield vocabulary(x + "embed_tokens")._replace(sources=None)
    if x + "shared_head.head.weight" in files.names():
        yield vocabulary(x + "shared_head.head")


def to_bf16(values: Array) -> NDArray[np.uint16]:
    """Round to nearest even, as bits. NaN becomes some NaN."""
    bits = values.view(np.uint32) if values.flags.c_contiguous else values.copy().view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
