"""Coded matrices for tests: one parameter without a model around it, fed in pieces; whole layouts as headers."""

import random

import numpy as np
import torch
from independent_codec import Made, Raw, make, random_tensor
from layouts import config_of, read_layouts

from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import Index
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.kernels.types import Matrix
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import Kind, Param, Part
from saccade.plan import Layout, Plan, make_plan
from saccade.plan.lower import Sources, lower
from saccade.weights.loader import Loader
from saccade.weights.weights import Weights

LAYOUTS = read_layouts()


def to_torch(raw: Raw) -> torch.Tensor:
    flat = torch.from_numpy(np.frombuffer(raw.data.tobytes(), np.uint8).copy())
    return flat.view(TORCH_DTYPES[raw.dtype]).view(raw.shape)


def entries_of(tensors: dict[str, Raw]) -> dict[str, Entry]:
    return {n: Entry(n, r.dtype, tuple(r.shape), "f", 0, r.data.nbytes) for n, r in tensors.items()}


def plan_param(param: Param, tensors: dict[str, Raw], dtype: str = "auto") -> Plan:
    """A plan of one parameter, without a model around it."""
    index = Index("test", (), entries_of(tensors), (), (), 0)
    config = ModelConfig.from_dict(config_of(LAYOUTS["03-bf16"], small=True))
    return lower([param], config, Sources(index), Layout(), dtype, True, ())


def feed_all(plan: Plan, tensors: dict[str, Raw], dice: random.Random) -> Weights:
    """In a random order, in random pieces, through one buffer that is overwritten."""
    loader, pieces = Loader(plan), []
    for name, raw in tensors.items():
        tensor = to_torch(raw)
        rows = len(tensor) if tensor.ndim else 1
        cuts = (
            sorted({0, rows, *(dice.randrange(rows) for _ in range(dice.choice((0, 1, 2))))}) if tensor.ndim else [0, 1]
        )
        pieces += [(name, tensor[a:b] if tensor.ndim else tensor, a) for a, b in zip(cuts, cuts[1:], strict=False)]
    dice.shuffle(pieces)
    for name, piece, first in pieces:
        buffer = piece.clone()
        loader.feed(name, buffer, first)
        buffer.view(-1).view(torch.uint8).fill_(0xFF)
    return loader.finish()


def made_small(name: str) -> Made:
    return make(LAYOUTS[name], config_of(LAYOUTS[name], small=True))


def plan_small(name: str, tensors: dict[str, Raw], **config: object) -> Plan:
    index = Index("test", (), entries_of(tensors), (), (), 0)
    return make_plan(ModelConfig.from_dict(config_of(LAYOUTS[name], small=True) | config), index)


FOUND = [rule for layout in LAYOUTS.values() for rule in layout.rules if rule.value]
# Each format once: its formula, and its scales' dtype and shape.
RULES = {f"{r.value} {r.tensors[1].dtype} {','.join(r.tensors[1].dims)}": r for r in FOUND}


def encoded(form: str, rows: int, columns: int, halves: int, experts: int = 3) -> Matrix:
    """Experts in an encoding of checkpoint/encoding.py, through plan and loader."""
    rule, dice = RULES[form], np.random.default_rng(1)
    tensors: dict[str, Raw] = {}
    parts = []
    for e in range(experts):
        for h in range(halves):
            stored = {t.leaf: random_tensor(t, (rows, columns), rule, dice) for t in rule.tensors}
            tensors.update((f"{e}.{h}.{leaf}", raw) for leaf, raw in stored.items())
            put = ((e, e + 1), (h * rows, (h + 1) * rows), (0, columns))
            parts.append(Part(f"{e}.{h}.weight", (rows, columns), ((0, rows), (0, columns)), put))
    plan = plan_param(Param("m", Kind.EXPERTS, (experts, halves * rows, columns), tuple(parts)), tensors)
    assert plan.stored["m"].encoding is not None, plan.notes
    return feed_all(plan, tensors, random.Random(0)).matrix("m")
