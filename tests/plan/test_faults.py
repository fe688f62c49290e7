"""Ways in which checkpoints have been wrong in the wild. Each is named before a tensor byte is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plans import problems_of
from safetensors.torch import load_file, save_file
from small_checkpoints import small_config, small_tensors, write_small
from torch import Tensor

import saccade.weights.loader
from saccade.checkpoint.index import read_index
from saccade.models.dsa.config import ModelConfig
from saccade.plan import make_plan

WK = "model.layers.1.self_attn.indexer.wk.weight"
WP = "model.layers.1.self_attn.indexer.weights_proj.weight"
SHARD = "model-00002-of-00003.safetensors"

Tensors = dict[str, Tensor]


def drop(*names: str) -> Callable[[Tensors], None]:
    return lambda t: [t.pop(n) for n in names] and None  # type: ignore[func-returns-value]


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: to(t[name])})


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda t: t.update({new: t.pop(old)})


def swap_formats(t: Tensors) -> None:
    """BF16 numbers beside an FP8 scale: a half-finished conversion."""
    t[WK] = t[WK].bfloat16()


IN_TENSORS: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "lost scale": (drop(WK + "_scale_inv"), WK, "its scale"),
    "lost weight of a scale": (drop(WK), WK, "not in the checkpoint"),
    "lost partner": (drop(WP), WP, "not in the checkpoint"),
    "lost pair": (drop(WK, WK + "_scale_inv"), WK, "not in the checkpoint"),
    "lost bias of k_norm": (drop(WK.replace("wk.weight", "k_norm.bias")), WK.replace("wk.weight", "k_norm.bias"), "expected shape"),
    "lost expert": (drop("model.layers.2.mlp.experts.7.up_proj.weight"), "model.layers.2.mlp.experts.7.up_proj.weight", "not in"),
    "lost norm of the MTP layer": (drop("model.layers.3.hnorm.weight"), "model.layers.3.hnorm.weight", "not in"),
    "scale of the MTP layer's wk lost": (drop("model.layers.3.self_attn.indexer.wk.weight_scale_inv"), "model.layers.3.self_attn.indexer.wk.weight", "its scale"),
    "transposed": (change(WP, lambda w: w.T.contiguous()), WP, "transposed?"),
    "transposed codes": (change(WK, lambda w: w.T.contiguous()), WK, "transposed?"),
    "truncated rows": (change(WP, lambda w: w[:10].contiguous()), WP, r"has shape \[10, 256\]"),
    "extra tensor": (lambda t: t.update({"model.layers.1.self_attn.indexer.weights_proj.bias": torch.ones(16)}), "weights_proj.bias", "no parameter uses it"),
    "a layer too many": (lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(256)}), "model.layers.4.input_layernorm.weight", "no parameter uses it"),
    "renamed tensor": (rename(WP, WP.replace("weights_proj", "indexers_proj")), WP, "not in the checkpoint"),
    "renamed scale": (rename(WK + "_scale_inv", WK + "_scale_xyz"), WK, "its scale"),
    "raw bytes in place of FP8": (change(WK, lambda w: w.view(torch.uint8)), WK, "holds U8 .* expected U8 codes .* raw bytes"),
    "FP8 of the other kind": (change(WK, lambda w: w.float().to(torch.float8_e5m2)), WK, "F8_E5M2"),
    "integers": (change(WP, lambda w: w.to(torch.int32)), WP, "I32"),
    "doubles": (change(WP, lambda w: w.double()), WP, "F64"),
    "floored scale rows": (change("model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv", lambda s: s[:3].contiguous()), "kv_a_proj_with_mqa.weight_scale_inv", r"need F32 or BF16 or F8_E8M0 \[4, 2\] \(FP8 128x128\)"),
    "scale of another block size": (change(WK + "_scale_inv", lambda s: torch.ones(1, 8)), WK + "_scale_inv", "need F32"),
    "packed scale of another width": (change(WK + "_scale_inv", lambda s: torch.ones(64, 2, dtype=torch.int32)), WK + "_scale_inv", r"is I32 \[64, 2\]"),
    "integers as scale": (change(WK + "_scale_inv", lambda s: s.to(torch.int32)), WK + "_scale_inv", "is I32"),
    "scale beside plain numbers": (swap_formats, WK + "_scale_inv", "stored as BF16, which needs none"),
}  # fmt: skip


def in_file(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: change(root / SHARD)


def cut(path: Path, by: int = 100) -> None:
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - by)


def duplicate_in_another_file(root: Path) -> None:
    first = root / "model-00001-of-00003.safetensors"
    tensors = load_file(first)
    stolen = load_file(root / SHARD)
    tensors["model.norm.weight"] = stolen.get("model.norm.weight", torch.ones(256, dtype=torch.bfloat16))
    save_file(tensors, first)
    for other in root.glob("model-0000[23]*"):
        save_file({**load_file(other), "model.norm.weight": tensors["model.norm.weight"]}, other)


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def double_name(root: Path) -> None:
    """The header lists one name twice; a plain JSON reader would keep the last."""
    path = root / SHARD
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip()
    names = [n for n in json.loads(header) if n != "__metadata__"]
    twin = json.dumps(json.loads(header)[names[0]])
    header = header[:-1] + f',"{names[0]}":{twin}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def overlapping(root: Path) -> None:
    path = root / SHARD
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    a, b = [n for n in header if n != "__metadata__" and header[n]["dtype"] == "F8_E4M3"][:2]
    length = header[a]["data_offsets"][1] - header[a]["data_offsets"][0]
    start = header[b]["data_offsets"][0]
    header[a]["data_offsets"] = [start, start + length]
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


# What breaks; the problems, each by name, kind and a part of its text; whether the shard's tensors are lost with it.
IN_FILES: dict[str, tuple[Callable[[Path], None], list[tuple[str, str, str]], bool]] = {
    "truncated file": (in_file(cut), [(SHARD, "truncated", "1 tensor cut off")], False),
    "file cut inside its header": (in_file(lambda p: p.write_bytes(p.read_bytes()[:200])), [(SHARD, "truncated", "its header alone needs")], True),
    "empty file": (in_file(lambda p: p.write_bytes(b"")), [(SHARD, "truncated", "has 0 bytes, too few")], True),
    "bytes behind the end": (in_file(lambda p: p.write_bytes(p.read_bytes() + b"x" * 9)), [(SHARD, "oversized", "bytes, expected")], False),
    "header length beyond the file": (in_file(lambda p: p.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")), [(SHARD, "header", "no safetensors file")], True),
    "a page of HTML": (in_file(lambda p: p.write_bytes(b"<!DOCTYPE html><html>" * 9)), [(SHARD, "header", "no safetensors file")], True),
    "missing shard": (in_file(Path.unlink), [(SHARD, "missing-file", "89 tensors .* is not here; download it")], True),
    "one name twice in a header": (double_name, [("model.layers.1.", "duplicate", f"stands twice in the header of {SHARD}")], False),
    "overlapping offsets": (overlapping, [(SHARD, "hole", "belong to no tensor"), ("model.layers.1.", "overlap", f"overlaps .* in {SHARD}")], False),
    "one name in three files": (duplicate_in_another_file, [
        ("model.norm.weight", "index", "is in model-00001-of-00003.safetensors, but"), ("model.norm.weight", "index", f"is in {SHARD}, but"),
        (SHARD, "duplicate", "model.norm.weight that model-00001"), ("model-00003", "duplicate", "model.norm.weight that model-00002"),
    ], False),
    "index.json names the wrong file": (edit_index(lambda m: m.update({WK: next(f for f in m.values() if f != m[WK])})), [(WK, "index", "that file lacks it"), (WK, "index", f"is in {SHARD}, but .* names")], False),
    "index.json lacks a tensor": (edit_index(lambda m: m.pop(WK)), [(WK, "index", "does not list it")], False),
    "index.json names a tensor that is nowhere": (edit_index(lambda m: m.update({"model.layers.1.foo": SHARD})), [("model.layers.1.foo", "index", "that file lacks it")], False),
    "index.json is no JSON": (lambda root: (root / "model.safetensors.index.json").write_text("{") and None, [("model.safetensors.index.json", "index", "is not JSON")], False),
}  # fmt: skip


def write_three(root: Path, tensors: Tensors) -> Path:
    names = sorted(tensors)
    return write_small(root, small_config(), tensors, shard_of=lambda n: names.index(n) * 3 // len(names))


@pytest.mark.parametrize("fault", IN_TENSORS)
def test_wrong_tensors_are_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, name, text = IN_TENSORS[fault]
    tensors = small_tensors(small_config())
    break_it(tensors)
    found = problems_of(write_three(tmp_path, tensors), monkeypatch)
    assert any(name in p.name and re.search(text, p.text) for p in found), found
    assert len(found) <= 2, found  # and nothing else is accused


@pytest.mark.parametrize("fault", IN_FILES)
def test_wrong_files_are_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, expected, is_lost = IN_FILES[fault]
    root = write_three(tmp_path, small_tensors(small_config()))
    held = set(load_file(root / SHARD))
    break_it(root)
    found = problems_of(root, monkeypatch)
    missing = [p for p in found if p.kind == "missing"]
    others = [p for p in found if p.kind != "missing"]
    assert len(others) == len(expected), found  # and nothing else is accused
    for problem, (name, kind, text) in zip(others, expected, strict=True):
        assert problem.name.startswith(name) and problem.kind == kind and re.search(text, problem.text), problem
    assert bool(missing) == is_lost and {p.name for p in missing} <= held


def test_a_sound_checkpoint_has_no_problem(tmp_path: Path) -> None:
    root = write_three(tmp_path, small_tensors(small_config()))
    saccade.weights.loader.load(make_plan(ModelConfig.load(root), read_index(root)))


def test_all_problems_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = small_tensors(small_config())
    for name in (WP, WK + "_scale_inv", "model.norm.weight", "model.layers.2.mlp.experts.0.down_proj.weight"):
        tensors.pop(name)
    found = problems_of(write_three(tmp_path, tensors), monkeypatch)
    for name in (WP, WK, "model.norm.weight", "model.layers.2.mlp.experts.0.down_proj.weight"):
        assert any(p.name == name for p in found), name
