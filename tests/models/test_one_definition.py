"""A layer is said once, in models/dsa: what is changed there changes on every path, and no other place says it."""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import assemble, page_table, step_batch, tiny_config, tiny_tensors
from torch import Tensor

import saccade
from saccade.engine.pages import allocate_cache
from saccade.kernels.types import Mlp, Norm, Selection
from saccade.models.dsa import indexer
from saccade.models.dsa.decoder import DecoderLayer
from saccade.models.dsa.transformer import Transformer
from saccade.ops.gpu import Gpu
from saccade.ops.interface import Ops, Residual
from saccade.ops.reference import Reference
from saccade.ops.step import Step

PACKAGE = Path(saccade.__file__).parent
CONFIG = tiny_config(num_hidden_layers=1)
CONTEXT = 40  # of which 16 are looked at
TOKENS = [(11 * i + 5) % 96 for i in range(CONTEXT)]
STEPS = (1, 2, 3, 17)  # tokens: those with a prepared norm, and the two other columns of the table in ops/gpu.py
PATHS: dict[str, type[Reference] | type[Gpu]] = {"reference": Reference, "kernels": Gpu}


def make_model() -> Transformer:
    return Transformer(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG), "auto", True, 128), Reference())


def run(path: str, size: int) -> tuple[Tensor, Tensor]:
    """The hidden states of the last `size` tokens, on one path, and the first layer's index keys of all."""
    model = make_model()
    pools, table = allocate_cache(CONFIG, 3, "auto", "cpu", mtp=False), page_table([CONTEXT])
    with torch.inference_mode():
        for start, end, ops in ((0, CONTEXT - size, Reference()), (CONTEXT - size, CONTEXT, PATHS[path]())):
            batch = step_batch([(0, TOKENS[start:end], start)], table)
            hidden = model.with_ops(ops).forward(batch, pools)
    keys = pools.index_keys[0]
    assert keys is not None
    return hidden, keys.data[batch.slots].float()


run_as_it_is = cache(run)
Patch = Callable[[pytest.MonkeyPatch], None]


def change_an_epsilon(patch: pytest.MonkeyPatch) -> None:
    """Of the index keys' norm. What they are multiplied by shrinks by some tenths."""
    patch.setattr(indexer, "EPS", 1.0)


def leave_out_the_mlps(patch: pytest.MonkeyPatch) -> None:
    def attend_only(
        self: DecoderLayer, ops: Ops, x: Residual, step: Step, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection]:
        return self.attention(ops, x, self.input_norm, step, given, following)

    patch.setattr(DecoderLayer, "__call__", attend_only)


@pytest.mark.parametrize("size", [1, 3, 17])
@pytest.mark.parametrize("change", [change_an_epsilon, leave_out_the_mlps])
def test_a_change_of_the_layer_is_a_change_of_both_paths(
    change: Patch, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: run_as_it_is(path, size) for path in PATHS}
    change(monkeypatch)
    after = {path: run(path, size) for path in PATHS}
    watched = 1 if change is change_an_epsilon else 0  # a selection may stay as it is where all keys shrink
    for path in PATHS:
        assert (after[path][watched] - before[path][watched]).abs().max() > 0.1
    for found, expected in zip(after["kernels"], after["reference"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wrong", ["weight", "epsilon"])
@pytest.mark.parametrize("size", STEPS)
@pytest.mark.parametrize("path", PATHS)
def test_a_norm_that_was_not_announced_is_refused(path: str, size: int, wrong: str) -> None:
    """By the first reader behind attention, and by the first in front of it, whatever the kernels have prepared."""
    for name in ("post_attention_norm", "input_norm"):
        model = make_model()
        layer, pools = model.layers[0], allocate_cache(CONFIG, 3, "auto", "cpu", mtp=False)
        right: Norm = getattr(layer, name)
        other = Norm(right.weight.clone(), right.eps) if wrong == "weight" else right._replace(eps=2 * right.eps)
        ops = PATHS[path]()
        batch = step_batch([(0, TOKENS[:size], 0)], page_table([size]))
        x, rotation = ops.begin(batch.tokens, batch.positions, model.embed_tokens, model.rotary, layer.input_norm)
        step = Step(batch, pools, rotation, None)
        with torch.inference_mode(), pytest.raises(ValueError, match="another norm"):
            if name == "post_attention_norm":
                x, _ = layer.attention(ops, x, layer.input_norm, step, None, right)
                assert isinstance(layer.mlp, Mlp)
                ops.add_mlp(x, other, layer.mlp, model.norm)
            else:
                layer.attention(ops, x, other, step, None, layer.post_attention_norm)


# What a layer asks for. `begin` and `logits` are not in it: they stand around the layers.
OF_A_LAYER = {
    "project", "make_queries", "score", "select", "attend", "add_projection", "add_mlp", "route", "add_experts",
}  # fmt: skip


OPS = re.compile(r"(.*\.)?ops")
IMPLEMENTATION = re.compile(r"super\(\)|Gpu|Reference")


def walk_own(function: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, but not in functions within it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from walk_own(node)


def find_calls(text: str) -> list[tuple[str, str]]:
    """(function, operation) of each operation of a layer that a function asks `ops`, or a class of them, for. One that
    stands for an operation may ask for the same: an override."""
    return [
        (function.name, call.func.attr)
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        for call in walk_own(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in OF_A_LAYER
        if (asked := ast.unparse(call.func.value))
        if OPS.fullmatch(asked) or (IMPLEMENTATION.fullmatch(asked) and function.name != call.func.attr)
    ]


def test_no_other_place_says_what_a_layer_does() -> None:
    """Families do, in their folders; ops/ says how. All else may replace an operation, but not put two in a row."""
    assert set(vars(Ops)) > OF_A_LAYER
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "ops" and (calls := find_calls(path.read_text()))
    }
    assert {Path(name).parts[0] for name in found} == {"models"}, found
    assert {operation for calls in found.values() for _, operation in calls} == OF_A_LAYER
