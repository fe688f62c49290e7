"""Files beside a model that are none of it are left alone, by name; those that may be part of it are used or refused."""

import json
from pathlib import Path

import pytest
import torch
from commands import Run
from plans import plan_of
from safetensors.torch import save_file
from small_checkpoints import small_config, small_tensors, write_small
from torch import Tensor

from saccade.checkpoint.index import INDEX_FILE
from saccade.convert.changes import Mode
from saccade.convert.prepare import prepare_conversion
from saccade.plan import prove
from saccade.weights.loader import load

C = small_config()
TENSORS = small_tensors(C, seed=3)
LORA = {
    f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_{s}.weight": torch.ones(4, 8)
    for i in (0, 1)
    for s in "AB"
}
MISTRAL = {"layers.0.attention.wq_a.weight": torch.ones(8, 8), "tok_embeddings.weight": torch.ones(8, 8)}
EAGLE = {"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 8), "fc.weight": torch.ones(8, 8)}
MTP_ELSEWHERE = {"mtp.layers.0.eh_proj.weight": torch.ones(8, 8)}
CACHE = {f"model.layers.{i}.self_attn.k_scale": torch.ones(()) for i in range(2)}
STRAYS: dict[str, dict[str, Tensor]] = {
    "adapter_model": LORA, "consolidated": MISTRAL, "optimizer": {"state.0.exp_avg": torch.ones(8)},
    "optimizer_2": {"state.0.exp_avg": torch.ones(9)},  # the same name as in the other
    "draft": EAGLE, "mtp": MTP_ELSEWHERE, "kv_cache_scales": CACHE, "rng.state": {"7": torch.ones(1)},
}  # fmt: skip
MTP = f"model.layers.{C['num_hidden_layers']}."


def add(root: Path, **files: dict[str, Tensor]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, root / f"{name}.safetensors")
    return root


@pytest.mark.parametrize("has_list", [True, False])
def test_files_of_something_else_are_left_alone_and_each_is_named(has_list: bool, tmp_path: Path) -> None:
    """Beside shards that are listed; and beside a model in one file, without any list."""
    root = add(write_small(tmp_path / "m", C, TENSORS), **STRAYS)
    if not has_list:
        (root / INDEX_FILE).unlink()
    plan = plan_of(root)
    assert prove(plan) == [] and plan.index.entries.keys() == TENSORS.keys()
    for name, tensors in STRAYS.items():
        [note] = [note for note in plan.notes if note.startswith(f"{name}.safetensors")]
        assert next(iter(tensors)) in note or len(tensors) > 1 and min(tensors) in note
        assert "left alone" in note and ("is not listed" in note) == has_list
    assert len(plan.index.files) == 1 and not any("files are used" in note for note in plan.notes)
    load(plan)
    job = prepare_conversion(root, tmp_path / "out", Mode("bf16"))
    assert {o.name for o in job.outputs} == {f.name for f in plan.index.files}


def test_shards_without_a_list_are_used_and_the_stray_among_them_is_not(tmp_path: Path) -> None:
    root = write_small(tmp_path, C, TENSORS, shard_of=lambda name: len(name) % 3)
    (root / INDEX_FILE).unlink()
    plan = plan_of(add(root, adapter_model=LORA))
    assert prove(plan) == [] and len(plan.index.files) == 3
    assert [n.split()[0] for n in plan.notes if "safetensors" in n] == ["no", "adapter_model.safetensors:"]


def test_a_file_with_an_expected_name_is_used_or_refused(tmp_path: Path) -> None:
    mine = {n: w for n, w in TENSORS.items() if n.startswith(MTP)}
    rest = {n: w for n, w in TENSORS.items() if n not in mine}
    root = add(write_small(tmp_path / "a", C, rest), mtp=mine, adapter_model=LORA)
    plan = plan_of(root)
    assert prove(plan) == [] and plan.has_mtp and plan.index.entries.keys() == TENSORS.keys()
    root = add(write_small(tmp_path / "b", C, rest), mtp=mine | LORA)  # one expected name, and the whole file counts
    assert {p.name for p in prove(plan_of(root))} == LORA.keys()
    assert all("is in mtp.safetensors" in p.text for p in prove(plan_of(root)))
    scale = next(n for n in mine if n.endswith("wk.weight_scale_inv"))
    root = add(write_small(tmp_path / "c", C, rest), scales={scale: mine[scale]})  # a scale belongs to an expected name
    assert prove(plan_of(root)) != []
    name = "model.norm.weight"
    root = add(write_small(tmp_path / "d", C, TENSORS), adapter_model=LORA | {name: TENSORS[name]})
    assert [(p.kind, p.name) for p in prove(plan_of(root))] == [("mixed-file", "adapter_model.safetensors")]


def test_what_the_list_names_is_the_model_even_if_nothing_in_it_is_expected(tmp_path: Path) -> None:
    """Renamed layers in a shard of their own would be lost in silence otherwise."""
    root = add(write_small(tmp_path, C, TENSORS), adapter_model=LORA)
    listing = json.loads((root / INDEX_FILE).read_text())
    listing["weight_map"] |= dict.fromkeys(LORA, "adapter_model.safetensors")
    (root / INDEX_FILE).write_text(json.dumps(listing))
    found = prove(plan_of(root))
    assert {p.name for p in found} == LORA.keys() and all("is in adapter_model.safetensors" in p.text for p in found)


def test_check_names_each_and_no_more_lines_than_can_be_read(run: Run, tmp_path: Path) -> None:
    root = add(write_small(tmp_path / "m", C, TENSORS), **STRAYS)
    ran = run("check", root)
    proof, *notes = ran.out.splitlines()
    assert (ran.code, ran.err) == (0, "") and ": complete, " in proof
    assert {note.split()[1].removesuffix(".safetensors") for note in notes} == STRAYS.keys()
    assert all(note.startswith("note: ") and note.endswith(": left alone") for note in notes)
    letters = "abcdefghijklmnopqrstuvwxyz"
    add(root, **{f"{a}{b}": {f"{a}{b}.x": torch.ones(1)} for a in letters for b in "abcd"})
    *_, last = lines = run("check", root).out.splitlines()
    assert len(lines) == 10 and last == f"note: and {len(STRAYS) + 4 * len(letters) - 8} more"
    told = json.loads(run("check", root, "--json").out)["notes"]
    assert sum("left alone" in note for note in told) == len(STRAYS) + 4 * len(letters)


def test_of_another_models_files_none_is_left_alone(tmp_path: Path) -> None:
    """With names that no config expects, all are told; leaving all of them alone would leave nothing."""
    root = write_small(
        tmp_path, C, {n.removeprefix("model."): w for n, w in TENSORS.items() if not n.startswith("lm_head")}
    )
    (root / INDEX_FILE).unlink()
    plan = plan_of(add(root, adapter_model=LORA))
    assert LORA.keys() <= plan.index.entries.keys() and LORA.keys() <= {p.name for p in prove(plan)}


@pytest.mark.parametrize("what", ["cut", "lfs", "dtype", "expected dtype"])
def test_a_broken_file_that_no_list_names(what: str, tmp_path: Path) -> None:
    """Harmless if its header names nothing of this model; a problem, by its name, if that cannot be told."""
    root = add(
        write_small(tmp_path, C, TENSORS),
        optimizer={"state.0.exp_avg": torch.ones(8), "state.1.exp_avg": torch.ones(8)},
    )
    path = root / "optimizer.safetensors"
    raw = path.read_bytes()
    if what == "cut":
        path.write_bytes(raw[:-3])
    elif what == "lfs":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif what == "dtype":
        path.write_bytes(raw.replace(b'"F32"', b'"X32"', 1))
    else:
        name = MTP + "enorm.weight"
        text = json.dumps(
            {
                "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                name: {"dtype": "X9", "shape": [1], "data_offsets": [1, 2]},
            }
        )
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"ab")
    plan = plan_of(root)
    if what in ("cut", "dtype"):
        assert prove(plan) == [] and any("optimizer.safetensors is not listed" in note for note in plan.notes)
    elif what == "lfs":
        [problem] = prove(plan)
        assert problem.name == path.name and "Git LFS pointer" in problem.text and "move it away" in problem.text
    else:
        assert name in {p.name for p in prove(plan)}
