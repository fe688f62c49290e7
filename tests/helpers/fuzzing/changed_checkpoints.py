"""Small checkpoints, sound ones and such as have been changed: a case is a number, and gives files and their bytes.

Knows no product code but the table of dtypes' widths. fuzz_checkpoints.py judges what becomes of them.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from random import Random

import numpy as np
from expected_parameters import INDEX
from fuzz_headers import DTYPES, pack
from fuzzing import change_files, hostile, mutate_json
from header_checkpoints import published

from saccade.checkpoint.header import BITS

CONFIG = {
    "model_type": "deepseek_v32", "vocab_size": 24, "hidden_size": 160, "intermediate_size": 136,
    "moe_intermediate_size": 128, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "q_lora_rank": 128, "kv_lora_rank": 144, "qk_nope_head_dim": 56, "qk_rope_head_dim": 16, "v_head_dim": 40,
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "num_nextn_predict_layers": 1,
}  # fmt: skip


@dataclass
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Mutant:
    """A checkpoint that is being changed: tensors by file, then whatever is done to the files' bytes."""

    shards: dict[str, list[Tensor]]
    config: object
    listing: object = None  # None: an index.json that fits the shards is written

    def everything(self) -> list[Tensor]:
        return [t for shard in self.shards.values() for t in shard]


# How a matrix may be stored: its codes' suffix and dtype, how many of them share an element, and what stands beside
# them for [rows, columns], by suffix, dtype and shape.
Beside = Callable[[int, int], list[tuple[str, str, tuple[int, ...]]]]
STORED: dict[str, tuple[str, str, int, Beside]] = {
    "bf16": ("", "BF16", 1, lambda r, c: []),
    "fp8 block": ("", "F8_E4M3", 1, lambda r, c: [("_scale_inv", "F32", (up(r, 128), up(c, 128)))]),
    "fp8 block e8m0": ("", "F8_E4M3", 1, lambda r, c: [("_scale_inv", "F8_E8M0", (up(r, 128), up(c, 128)))]),
    "fp8 block bf16": ("", "F8_E4M3", 1, lambda r, c: [("_scale", "BF16", (up(r, 128), up(c, 128)))]),
    "fp8 tensor": ("", "F8_E4M3", 1, lambda r, c: [("_scale", "F32", ())]),
    "fp8 channel": ("", "F8_E4M3", 1, lambda r, c: [("_scale", "F32", (r, 1))]),
    "fp8 row": ("", "F8_E4M3", 1, lambda r, c: [("_scale", "F32", (r,))]),
    "fp8 packed exponents": ("", "F8_E4M3", 1, lambda r, c: [("_scale_inv", "I32", (r, up(c, 512)))]),
    "mxfp8": ("", "F8_E4M3", 1, lambda r, c: [("_scale", "U8", (r, up(c, 32)))]),
    "int8": ("", "I8", 1, lambda r, c: [("_scale", "F32", (r, 1))]),
    "nvfp4": ("", "U8", 2, lambda r, c: [("_scale", "F8_E4M3", (r, up(c, 16))), ("_scale_2", "F32", ())]),
    "nvfp4 ct": (
        "_packed",
        "U8",
        2,
        lambda r, c: [("_scale", "F8_E4M3", (r, up(c, 16))), ("_global_scale", "F32", (1,))],
    ),
    "mxfp4": ("", "U8", 2, lambda r, c: [("_scale", "U8", (r, up(c, 32)))]),
    "int4 ct": ("_packed", "I32", 8, lambda r, c: [("_scale", "BF16", (r, up(c, 128))), ("_shape", "I64", (2,))]),
    "w4afp8": ("", "I8", 2, lambda r, c: [("_scale_inv", "F32", (r, up(c, 128)))]),
}
EXPONENTS = ("U8", "F8_E8M0", "I32")


def up(n: int, by: int) -> int:
    return -(-n // by)


def fill(dtype: str, shape: tuple[int, ...], dice: Random) -> bytes:
    """Random numbers near 1 whatever the dtype: no NaN, so that a difference shows."""
    n = prod(shape)
    if dtype in ("F32", "BF16"):
        raw = np.frombuffer(dice.randbytes(4 * n), "<u4")
        bits = ((raw & 0x87FFFFFF) | 0x38000000).astype("<u4")  # both signs, 2^-15 to 2^-8 and 2^0 to 2^1
        return bits.tobytes() if dtype == "F32" else (bits >> 16).astype("<u2").tobytes()
    if dtype == "F8_E4M3":
        return (np.frombuffer(dice.randbytes(n), np.uint8) & 0xF7).tobytes()
    return dice.randbytes(n * BITS[dtype] // 8)


@functools.lru_cache(maxsize=64)
def build(kind: str, seed: int) -> Mutant:
    """A sound checkpoint. Its matrices are stored by `kind`, or, if that is "mixed", each in one way of all."""
    dice, tensors = Random(seed), list[Tensor]()
    for name, dtype, shape in published(CONFIG, mtp_copies=seed % 2 == 0):
        if name.endswith("_scale_inv"):
            continue
        if dtype != "F8_E4M3":
            tensors.append(Tensor(name, dtype, shape, fill(dtype, shape, dice)))
            continue
        end, codes, together, beside = STORED[dice.choice(list(STORED)) if kind == "mixed" else kind]
        held = (shape[0], shape[1] // together)
        tensors.append(Tensor(name + end, codes, held, fill(codes, held, dice)))
        for suffix, of, size in beside(*shape):
            data = fill(of, size, dice)
            if of in EXPONENTS:  # 2^-17 to 2^7
                data = bytes(dice.randrange(110, 135) for _ in data)
            tensors.append(Tensor(name + suffix, of, size, data))
    dice.shuffle(tensors)
    files = [f"model-{k:05}-of-00003.safetensors" for k in range(1, 4)]
    return Mutant({file: tensors[k::3] for k, file in enumerate(files)}, CONFIG)


# What is changed. Each takes the mutant in place; one that does not fit does nothing.


def change_data(m: Mutant, dice: Random) -> None:
    t = dice.choice(m.everything())
    data = bytearray(t.data)
    for _ in range(dice.choice((1, 8, 200))):
        if data:
            data[dice.randrange(len(data))] = dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    t.data = bytes(data)


def twin(m: Mutant, t: Tensor, dice: Random) -> Tensor:
    """Another tensor of the same dtype and shape, if there is one."""
    return dice.choice([o for o in m.everything() if (o.dtype, o.shape) == (t.dtype, t.shape)])


def swap_data(m: Mutant, dice: Random) -> None:
    a = dice.choice([t for t in m.everything() if "_scale" in t.name] or m.everything())
    b = twin(m, a, dice)
    a.data, b.data = b.data, a.data


def swap_names(m: Mutant, dice: Random) -> None:
    a = dice.choice(m.everything())
    b = twin(m, a, dice) if dice.random() < 0.7 else dice.choice(m.everything())
    a.name, b.name = b.name, a.name


def rename(m: Mutant, dice: Random) -> None:
    old, new = dice.choice((
        ("model.layers.", "model.language_model.layers."), ("model.", ""), ("layers.1.", "layers.7."), (".weight", ""),
        ("weight_scale_inv", "weight_scale"), ("weight_scale", "weight_scale_2"), ("_scale_inv", "_scale_xyz"),
        ("weights_proj", "indexers_proj"), (".wk.", ".wk_proj."), ("experts.1.", "experts.01."), ("proj", "PROJ"),
        ("layers.2.", "mtp.0."), ("weight_scale", "input_scale"), ("weight", "weight_packed"), ("k_norm", "q_norm"),
    ))  # fmt: skip
    hits = [t for t in m.everything() if old in t.name]
    for t in hits if dice.random() < 0.3 else hits[:1]:
        t.name = t.name.replace(old, new)


def drop(m: Mutant, dice: Random) -> None:
    shard = dice.choice([s for s in m.shards.values() if s] or [[]])
    if shard:
        del shard[dice.randrange(len(shard))]


def double(m: Mutant, dice: Random) -> None:
    t = dice.choice(m.everything())
    shard = dice.choice(list(m.shards.values()))
    shard.append(Tensor(t.name, t.dtype, t.shape, dice.choice((t.data, dice.randbytes(len(t.data))))))


def add(m: Mutant, dice: Random) -> None:
    t = dice.choice(m.everything())
    end = dice.choice(("_scale_inv", "_scale", "_scale_2", "bias", "_global_scale", ".rotary_emb.inv_freq", ""))
    shape = dice.choice(((), (1,), (t.shape or (1,))[:1], t.shape))
    dice.choice(list(m.shards.values())).append(Tensor(t.name + end, "F32", shape, fill("F32", shape, dice)))


def change_dtype(m: Mutant, dice: Random) -> None:
    """Bytes seen as another dtype, of the same width or of another one with a shape that makes up for it."""
    t = dice.choice(m.everything())
    width = BITS[t.dtype] // 8
    t.dtype = dice.choice([d for d in BITS if BITS[d] == 8 * width] if dice.random() < 0.7 else DTYPES)
    other = BITS.get(t.dtype, 8) // 8
    if t.shape and other and other != width and t.shape[-1] * width % other == 0:
        t.shape = (*t.shape[:-1], t.shape[-1] * width // other)


def change_shape(m: Mutant, dice: Random) -> None:
    t = dice.choice(m.everything())
    n = prod(t.shape)
    half = (2 * t.shape[0], t.shape[1] // 2) if len(t.shape) == 2 else (1, *t.shape)
    t.shape = dice.choice((t.shape[::-1], (n,), (n, 1), (1, n), (*t.shape, 1), half, (*t.shape[:-1], 2**60), ()))


def convert_scale(m: Mutant, dice: Random) -> None:
    """A scale in another dtype or another published shape, with as many bytes as that has."""
    scales = [t for t in m.everything() if t.name.endswith(("_scale", "_scale_inv"))]
    if scales:
        t = dice.choice(scales)
        codes = next((o for o in m.everything() if o.name == t.name.rpartition("_scale")[0]), t)
        rows, columns = (codes.shape + (1, 1))[:2]
        t.dtype = dice.choice((t.dtype, "F32", "BF16", "F8_E8M0", "U8", "F16"))
        t.shape = dice.choice((
            t.shape, (), (1,), (1, 1), (rows,), (rows, 1), (rows, -(-columns // 32)), (-(-rows // 128), -(-columns // 128)),
            (rows // 128, columns // 128),
        ))  # fmt: skip
        t.data = fill("F32" if t.dtype == "F32" else "F8_E4M3", (prod(t.shape) * BITS[t.dtype] // 8,), dice)
        t.data = t.data[: prod(t.shape) * BITS[t.dtype] // 8]


def move(m: Mutant, dice: Random) -> None:
    """Tensors go to other files, in another order, or into a file of their own; names of files change places."""
    files = list(m.shards)
    a, b = dice.choice(files), dice.choice(files)
    kind = dice.randrange(4)
    if kind == 0:
        dice.shuffle(m.shards[a])
    elif kind == 1:
        m.shards[a], m.shards[b] = m.shards[b], m.shards[a]
    elif kind == 2 and m.shards[a]:
        m.shards.setdefault(dice.choice(("mtp.safetensors", b)), []).append(m.shards[a].pop())
    else:
        m.shards[dice.choice(("another.safetensors", "0.safetensors", "model.safetensors", b))] = m.shards.pop(a)


def change_listing(m: Mutant, dice: Random) -> None:
    m.listing = mutate_json(fit(m), dice) if dice.random() < 0.8 else {"weight_map": hostile(dice)}


def keep_listing(m: Mutant, dice: Random) -> None:
    """index.json stays as it is now, whatever comes after."""
    m.listing = fit(m)


def change_config(m: Mutant, dice: Random) -> None:
    m.config = mutate_json(m.config, dice)


def fit(m: Mutant) -> dict:
    return {"metadata": {}, "weight_map": {t.name: file for file, shard in m.shards.items() for t in shard}}


MUTATIONS = (
    change_data, swap_data, swap_names, rename, drop, double, add, change_dtype, change_shape, convert_scale, move,
    change_listing, keep_listing, change_config,
)  # fmt: skip


def write(m: Mutant, dice: Random) -> dict[str, bytes]:
    """The mutant's files."""
    files = {"config.json": json.dumps(m.config).encode()}
    if dice.random() < 0.9 or m.listing is not None:
        files[INDEX] = json.dumps(m.listing if m.listing is not None else fit(m)).encode()
    for file, shard in m.shards.items():
        at, items = 0, []
        for t in shard:
            value = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
            items.append(f"{json.dumps(t.name)}:{json.dumps(value)}")
            at += len(t.data)
        dice.shuffle(items)  # the order of names is not that of bytes
        files[file] = pack(("{" + ",".join(items) + "}").encode(), b"".join(t.data for t in shard))
    return files


def mutate(case: int) -> tuple[dict[str, bytes], str]:
    """The files of a case, and what was done to them."""
    dice = Random(case)
    kind = dice.choices(("fp8 block", "bf16", "fp8 block e8m0", "mixed", dice.choice(list(STORED))), (5, 1, 1, 1, 2))[0]
    sound = build(kind, dice.randrange(4))
    m = Mutant({f: [Tensor(**vars(t)) for t in shard] for f, shard in sound.shards.items()}, sound.config)
    done = [dice.choice(MUTATIONS) for _ in range(dice.choice((0, 1, 1, 1, 2)))]
    for mutation in done:
        if m.everything():
            mutation(m, dice)
    files = write(m, dice)
    touched = not done or dice.random() < 0.15
    if touched and dice.random() < 0.95:
        change_files(files, dice)
    return files, ", ".join([kind, *(f.__name__ for f in done), *(["change_files"] if touched else [])])
