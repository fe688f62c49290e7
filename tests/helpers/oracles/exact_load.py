"""Load a plan and compare every parameter, bit for bit, with what tests/helpers/oracles/expected_parameters.py says of the files.

Used on whole checkpoints: by the fuzzing, and by tests of layouts that engines got wrong.
"""

import json
from pathlib import Path

import numpy as np
import torch
from expected_parameters import Files, Unclear, Want, codes_of, expected, numbers, to_bf16
from fuzzing import Failure
from numpy.typing import NDArray

from saccade.plan import Plan
from saccade.plan.types import Stored
from saccade.weights.loader import load


def compare(root: Path, plan: Plan) -> None:
    """Failure unless the plan loads to exactly what the files say, all of it."""
    weights = load(plan, threads=1)
    held = {name: weights.take(name) for name in weights.names()}
    try:
        files, c = Files(root), plan.config
        layers = range(c.num_hidden_layers + 1)
        full, sparse = {i for i in layers if c.has_indexer(i)}, {i for i in layers if c.is_sparse(i)}
        mtp = any(n.startswith(f"model.layers.{c.num_hidden_layers}.") for n in files.names())
        wants = {w.name: w for w in expected(json.loads((root / "config.json").read_bytes()), files, full, sparse, mtp)}
        for name, want in wants.items():
            if name not in held or not same(held[name], plan.stored[name], want, files):
                raise Failure(f"{name} ({plan.dtype}) was loaded, but not as the files have it")
            scale = held.get(name + ".scale")
            if plan.stored[name].group is not None and (scale is None or not same_scales(scale, want, files)):
                raise Failure(f"the scales of {name} were loaded, but not as the files have them")
    except Unclear as e:
        raise Failure(f"was loaded, but the files do not say it: {e}") from None
    if more := [n for n in held if n not in wants and n.rpartition(".")[0] not in wants]:
        raise Failure(f"loaded, though the model has no such parameter: {more[:5]}")
    unread = files.names() - files.asked - {i.name for i in plan.ignored}
    if unread:
        raise Failure(f"loaded without a word about {sorted(unread)[:5]}")


def same(found: torch.Tensor, stored: Stored, want: Want, files: Files) -> bool:
    """Whether a parameter has the bits that it should have; NaN is NaN, whatever its other bits."""
    if stored.dtype == "F32":
        values = found.numpy()
        return bool(values.shape == want.values.shape and np.array_equal(bits_of(values), bits_of(want.values)))
    if stored.dtype == "BF16":
        bits = found.view(torch.int16).numpy().view(np.uint16)
        bits = np.where((bits & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), bits)
        return bits.shape == want.values.shape and np.array_equal(bits, to_bf16(want.values))
    if want.sources is None:
        return False  # kept as codes, though it must not be
    raws = [[files.get(n) or files.must(n + "_packed") for n in row] for row in want.sources]
    codes = np.stack([np.concatenate([codes_of(raw) for raw in row]) for row in raws])
    return (
        found.numel() * found.element_size() == codes.size
        and found.view(torch.uint8).numpy().tobytes() == codes.tobytes()
    )


def bits_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.where(np.isnan(values), np.uint32(0x7FC00000), np.ascontiguousarray(values).view(np.uint32))


def same_scales(found: torch.Tensor, want: Want, files: Files) -> bool:
    """The scales of a matrix that is kept as codes: those of its parts, one over another."""
    rows = [[numbers(files.scale(name)) for name in row] for row in want.sources or []]
    try:
        values = np.stack([np.concatenate(row) for row in rows])
    except ValueError:
        return True  # one scale a tensor: how they are kept is seen in the float32 load
    return found.dtype != torch.float32 or np.array_equal(found.numpy().ravel(), values.ravel(), equal_nan=True)
