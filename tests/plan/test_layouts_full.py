"""The headers of the published layouts in full size: proven complete, and the bytes on the device counted by hand."""

import gc
import json
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from layouts import config_of, modules, read_layouts, specs

from saccade.checkpoint.header import Entry
from saccade.checkpoint.index import Index
from saccade.config.file import Config
from saccade.models.parameters import Kind
from saccade.models.registry import make_config
from saccade.plan import Layout, make_plan, plan_ranks, prove
from saccade.plan.check import check
from saccade.plan.show import DEVICE_SUFFIXES, show_plan
from saccade.plan.types import DTYPE_BYTES

LAYOUTS = read_layouts()
LOADED = [name for name, layout in LAYOUTS.items() if not layout.is_refused]
# Every encoding of experts once, in layers of each kind; all layouts and layers on request: one takes 2 to 5 s.
FIRST = {
    "05-nvfp4-everywhere",
    "07-nvfp4-fp8-compressed-tensors",
    "10-mxfp4-fp8-per-channel",
    "13-int4-fp8-compressed-tensors",
    "18-int8",
    "23-fp8-flash",
}
LAYERS = 12  # dense and sparse, with an indexer and without one; layouts tell layers apart by kind alone
CASES = [(n, True) for n in LOADED if n in FIRST] + [pytest.param(n, False, marks=pytest.mark.soak) for n in LOADED]


@pytest.fixture(scope="module", autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def config_file(name: str, is_cut: bool) -> dict[str, Any]:
    c = config_of(LAYOUTS[name], small=False)
    if not is_cut or LAYOUTS[name].model == "flash":
        return c
    types = {"indexer_types": c["indexer_types"][:LAYERS]} if "indexer_types" in c else {}
    return c | {"num_hidden_layers": LAYERS} | types


@cache
def full(name: str, is_cut: bool) -> tuple[Config, Index]:
    """Experts and matrices in full size."""
    c = config_file(name, is_cut)
    entries, at = {}, 0
    for tensor, dtype, shape in specs(LAYOUTS[name], c):
        size = DTYPE_BYTES[dtype] * math.prod(shape)
        entries[tensor] = Entry(tensor, dtype, shape, "model.safetensors", at, at + size)
        at += size
    return make_config(json.dumps(c).encode()), Index(name, (), entries, (), (), 0)


@pytest.mark.parametrize(("name", "is_cut"), CASES)
def test_full_size_headers_are_proven_and_their_bytes_are_right(name: str, is_cut: bool) -> None:
    config, index = full(name, is_cut)
    plan = make_plan(config, index)
    assert prove(plan) == []
    lines = 70 if LAYOUTS[name].model != "flash" else 80  # three sorts of layers, and images that are left unread
    assert len(show_plan(plan).splitlines()) < lines
    held, stored, unpacked = 0, 0, 0  # bytes of routed experts: on the device, in the file, as BF16
    for param in plan.params:
        if param.kind is Kind.EXPERTS:
            held += sum(
                plan.stored[param.name + leaf].nbytes for leaf in DEVICE_SUFFIXES if param.name + leaf in plan.stored
            )
    for (tensor, _, shape), rule in modules(LAYOUTS[name], config_file(name, is_cut)):
        if ".mlp.experts." in tensor:
            unpacked += 2 * math.prod(shape)
            if rule is None:
                stored += 2 * math.prod(shape)
            else:
                used = [rule.tensors[0].leaf, *rule.value.split()[2::2]]  # but for input_scale, weight_shape, ...
                entries = [index.entries[tensor.removesuffix("weight") + leaf] for leaf in used]
                stored += sum(e.stop - e.start for e in entries)
    print(f"{name}: routed experts {held / 1e9:.0f} GB on the device, as BF16 {unpacked / 1e9:.0f} GB")
    assert held == stored


@pytest.mark.parametrize("name", ["07-nvfp4-fp8-compressed-tensors"])
def test_the_ranks_of_a_packed_model_are_proven_and_share_its_bytes(name: str) -> None:
    config, index = full(name, True)
    plans = plan_ranks(config, index, [Layout(8, ep, 7) for ep in (1, 8)])
    whole = make_plan(config, index)
    experts = "model.layers.10.mlp.experts."
    assert [problem for plan in plans for problem in check(plan)] == []
    for plan in plans:
        for leaf in ("gate_up_proj", "gate_up_proj.scale", "down_proj", "down_proj.scale"):
            assert plan.stored[experts + leaf].nbytes * 8 == whole.stored[experts + leaf].nbytes
        assert not [note for note in plan.notes if "experts" in note]
