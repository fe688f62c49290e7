"""How numbers are stored in a checkpoint: plain, or as codes that mean nothing without their scale.

Descriptors only: no torch, no bytes. A row of ENCODINGS says which dtype the codes have, how the tensors around them
are called, and how many rows and columns share a scale. A new format is a new row. Which row a tensor fits is found in
coding.py; who multiplies is kernels/reference.py:dequantize, and nobody else.
"""

from dataclasses import dataclass

from saccade.checkpoint.leftovers import BESIDE

Shape = tuple[int, ...]

PLAIN = frozenset({"BF16", "F16", "F32"})
FLOATS = ("F32", "BF16", "F16")
# The modules whose weight is FP8 in DeepSeek-V3.2 and GLM-5-FP8: every projection of attention, MLP and indexer but
# weights_proj. Embedding, heads, norms, the router (mlp.gate) and eh_proj stay as they are.
FP8_MODULES = frozenset({
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    "gate_proj", "up_proj", "down_proj", "wq_b", "wk",
})  # fmt: skip
WHOLE = 1 << 40  # the side of a group that spans its axis, however long: ceil(n / WHOLE) is 1


@dataclass(frozen=True, eq=False)  # each row is itself: compared and hashed 46,000 times a plan
class Encoding:
    """value = code * scale, or code * scale * global scale, or code * scale / global scale.

    The codes of a matrix `X.weight` [rows, columns] lie in X.weight + one of `code_suffixes`, its scales in X.weight +
    one of `scale_suffixes`. `packed` numbers of a row share one element of the codes, first number in the lowest bits;
    in the same way `scales_packed` scales of a row share one element of the scales.
    """

    name: str
    code: str  # how one number is spelled: "e4m3", "int8", "e2m1", "int4" (two's complement), "uint4" (value + 8)
    codes: str  # dtype of the tensor of codes
    scale_dtypes: tuple[str, ...]
    group: tuple[int, int]  # rows and columns that share one scale, a property of the format, never of a division
    packed: int = 1
    scales_packed: int = 1
    code_suffixes: tuple[str, ...] = ("",)
    scale_suffixes: tuple[str, ...] = ("_scale_inv", "_scale")
    global_suffix: str | None = None  # one F32 for the whole matrix
    divides: bool = False  # by the global scale, which otherwise multiplies
    scale_held: str | None = None  # what scales are widened to on the device; None: held as they are stored
    is_dense: bool = False  # whether any linear layer is held in it; else only routed experts are

    def codes_shape(self, shape: Shape) -> Shape:
        """Shape of the tensor of codes of a [rows, columns] matrix."""
        return *shape[:-1], -(-shape[-1] // self.packed)

    @property
    def cell(self) -> tuple[int, int]:
        """Rows and columns whose scales share one element of the tensor of scales."""
        return self.group[0], self.group[1] * self.scales_packed

    def grid(self, shape: Shape) -> tuple[int, int]:
        """How many scales a [rows, columns] matrix has along either axis, however many share an element."""
        rows, columns = (-(-n // g) for n, g in zip(shape, self.group, strict=True))
        return rows, columns

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a [rows, columns] matrix: a ragged edge has a scale of its own (576 rows: 5)."""
        return tuple(-(-n // g) for n, g in zip(shape, self.cell, strict=True))

    def scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """All the ways to write `scale_shape`: [rows, 1] is also written [rows], and one scale for all also []."""
        grid = self.scale_shape(shape)
        if self.group[1] < WHOLE:
            return (grid,)
        return (grid[:1], grid) if self.group[0] < WHOLE else ((), grid[:1], grid)


ENCODINGS = (
    # DeepSeek-V3.2 and GLM-5-FP8 hold powers of two in F32; E8M0 is the same in one byte.
    Encoding("FP8 128x128", "e4m3", "F8_E4M3", ("F32", "BF16", "F8_E8M0"), (128, 128), scale_held="F32", is_dense=True),
    Encoding("FP8 per channel", "e4m3", "F8_E4M3", ("F32", "BF16"), (1, WHOLE), scale_held="F32"),
    Encoding("FP8 per tensor", "e4m3", "F8_E4M3", ("F32", "BF16"), (WHOLE, WHOLE), scale_held="F32"),
    Encoding("MXFP8", "e4m3", "F8_E4M3", ("F8_E8M0", "U8"), (1, 32)),
    # Four exponents to a word and a row of words for each row of codes, as Blackwell's GEMM reads them.
    Encoding("FP8 1x128 packed UE8M0", "e4m3", "F8_E4M3", ("I32",), (1, 128), scales_packed=4),
    Encoding("INT8 per channel", "int8", "I8", FLOATS, (1, WHOLE), scale_held="F32"),
    # ModelOpt multiplies by its second scale, compressed-tensors divides by its global one.
    Encoding("NVFP4", "e2m1", "U8", ("F8_E4M3",), (1, 16), packed=2,
             scale_suffixes=("_scale",), global_suffix="_scale_2"),
    Encoding("NVFP4 compressed-tensors", "e2m1", "U8", ("F8_E4M3",), (1, 16), packed=2, code_suffixes=("_packed",),
             scale_suffixes=("_scale",), global_suffix="_global_scale", divides=True),
    Encoding("MXFP4", "e2m1", "U8", ("U8", "F8_E8M0"), (1, 32), packed=2, code_suffixes=("", "_packed"),
             scale_suffixes=("_scale",)),
    Encoding("INT4 g128 compressed-tensors", "uint4", "I32", FLOATS, (1, 128), packed=8, code_suffixes=("_packed",),
             scale_suffixes=("_scale",)),
    Encoding("INT4 g128 W4AFP8", "int4", "I8", FLOATS, (1, 128), packed=2),
)  # fmt: skip
FP8_BLOCKS = ENCODINGS[0]

CODE_SUFFIXES = tuple({s: None for e in ENCODINGS for s in e.code_suffixes})
SCALE_SUFFIXES = tuple({s: None for e in ENCODINGS for s in e.scale_suffixes})
OFFSET, ZERO_POINT = "_offset", "_zero_point"  # of symmetric codes; must hold zeros
SIGNED = frozenset({"I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F8_E4M3"})  # zero points in which zero is 0
# Beside codes this would change what they mean, and no row of the table says how.
REORDER = "_g_idx"

# All tensors that stand beside a matrix X.weight, by the last part of their names.
STORED_LEAVES = frozenset(
    "weight" + suffix
    for suffix in (
        *CODE_SUFFIXES[1:], *SCALE_SUFFIXES, *(e.global_suffix for e in ENCODINGS if e.global_suffix), OFFSET,
        ZERO_POINT, REORDER, "_shape",
    )
)  # fmt: skip
# The same for formats that are not in the table: the names of their codes, then of what they need besides.
FOREIGN = {"qweight": "AWQ or GPTQ codes"}
FOREIGN_LEAVES = frozenset({"qzeros", "scales", "g_idx"})
# Scales of codes, by the last part of their names.
SCALE_LEAVES = frozenset(
    "weight" + suffix for suffix in (*SCALE_SUFFIXES, *(e.global_suffix for e in ENCODINGS if e.global_suffix))
)


def weight_of(name: str) -> str | None:
    """The matrix beside which a tensor called `name` stands, or None if it is not called like such a tensor."""
    module, dot, leaf = name.rpartition(".")
    if leaf in STORED_LEAVES or leaf in BESIDE or leaf in FOREIGN or leaf in FOREIGN_LEAVES:
        return module + dot + "weight"
    return None
