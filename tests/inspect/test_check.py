"""`saccade check --contents --sha256 --json` and `saccade plan A --diff B` on the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Run
from header_checkpoints import Spec, published, write_headers
from independent_codec import Raw, bf16_bits, make
from independent_codec import write as write_raw
from layouts import config_of, read_layouts
from safetensors.torch import save_file
from small_checkpoints import small_config, small_tensors, sums, write_small

from saccade.checkpoint.index import read_index

KV = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
WK = "model.layers.1.self_attn.indexer.wk.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("sound"), small_config(), small_tensors(small_config()))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound headers, three NaN codes, and a bias of zeros."""
    tensors = small_tensors(small_config())
    for layer in range(3):
        tensors[KV.replace("layers.1", f"layers.{layer}")].view(torch.uint8)[3, layer] = 0x7F
    tensors["model.layers.0.self_attn.indexer.k_norm.bias"].zero_()
    return write_small(tmp_path_factory.mktemp("spoiled"), small_config(), tensors)


def test_contents_of_a_sound_model_are_two_lines(run: Run, sound: Path) -> None:
    ran = run("check", sound, "--contents", "--threads", "1")
    assert (ran.code, ran.err) == (0, "")
    proof, outcome, indexer = ran.out.splitlines()
    assert ": complete, " in proof
    assert (
        outcome.startswith("contents: sound; read ")
        and "by 1 thread, buffers and temporaries of at most 25.3 MB" in outcome
    )
    assert indexer.startswith("indexer: model.layers.{0-3}.self_attn.indexer.wk.weight (4, FP8 128x128): scales ")


def test_contents_of_a_spoiled_model_are_named_folded(run: Run, spoiled: Path) -> None:
    assert run("check", spoiled).code == 0  # nothing that headers could tell
    ran = run("check", spoiled, "--contents")
    assert (ran.code, ran.err) == (1, "")
    assert "contents: 3 problems, 1 note; read " in ran.out
    name = KV.replace("layers.1", "layers.{0-2}")
    assert f"\nnot-finite: {name} (3 of them) numbers that are NaN or infinite: 1, first at [3, {{0-2}}]\n" in ran.out
    assert (
        "\nnote: all-zero: model.layers.0.self_attn.indexer.k_norm.bias [64] holds nothing but zeros, as it may\n"
        in ran.out
    )


def test_one_empty_file_is_one_cause(run: Run, tmp_path: Path) -> None:
    """What its tensors would have been is folded to a line, and nothing is said of numbers that nobody read."""
    root = write_small(tmp_path, small_config(), small_tensors(small_config()))
    (shard,) = root.glob("*.safetensors")
    shard.write_bytes(b"")
    ran = run("check", root, "--contents")
    first, cause, rest, *contents = ran.out.splitlines()
    assert ran.code == 1 and ": incomplete, " in first and "0 tensors in 1 file, 0 B" in first
    assert cause.startswith(f"truncated: {shard.name} has 0 bytes, too few")
    assert rest.startswith(f"missing: {shard.name} may hold ") and rest.endswith(": mend it first")
    assert contents[0] == "contents: not read" and contents[1].startswith("note: not-read: ") and len(contents) == 2
    ran = run("plan", root)
    assert ran.err.splitlines()[-2:] == [cause, rest]
    problems = json.loads(run("check", root, "--json").out)["problems"]
    assert len(problems) > 20 and problems[-1]["kind"] == "missing"  # nothing is folded there
    # A tensor that is missing beside a file of which only the end is cut off is named.
    whole = {n: t for n, t in small_tensors(small_config()).items() if n != "lm_head.weight"}
    save_file(whole, shard)
    with shard.open("r+b") as f:
        f.truncate(shard.stat().st_size - 7)
    assert "\nmissing: lm_head.weight is not in the checkpoint" in run("check", root).out


def test_check_json_says_everything(run: Run, sound: Path, spoiled: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(sums(sound))
    data = json.loads(run("check", sound, "--json").out)
    assert data["sound"] is True and data["contents"] is None and data["problems"] == []
    assert data["tensors"] == len(read_index(sound).entries)
    data = json.loads(run("check", sound, "--json", "--contents", "--sha256", tmp_path / "sums").out)
    assert data["contents"]["digests"] == 3 and data["contents"]["was_scanned"] is True
    ran = run("check", spoiled, "--json", "--contents")
    data = json.loads(ran.out)
    assert ran.code == 1 and data["sound"] is False and data["problems"] == []
    assert [p["kind"] for p in data["contents"]["problems"]] == ["not-finite"] * 3
    assert len(data["contents"]["upcasts"]) == 4


def test_sha256_alone_reads_no_tensor_as_numbers(run: Run, spoiled: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(sums(spoiled))
    ran = run("check", spoiled, "--sha256", tmp_path / "sums")
    assert ran.code == 0 and "\nsha256: 3 files as the list says\n" in ran.out
    assert "\ndigests: sound; read " in ran.out and "contents" not in ran.out
    (tmp_path / "sums").write_text("0" * 64 + "  config.json\n")
    ran = run("check", spoiled, "--sha256", tmp_path / "sums")
    assert ran.code == 1
    assert "sha256: config.json has the SHA-256 " in ran.out
    assert "is part of the checkpoint, but not in the list of digests" in ran.out


def test_a_single_file_is_checked_by_itself(run: Run, sound: Path, tmp_path: Path) -> None:
    file = next(sound.glob("*.safetensors"))
    listing = tmp_path / "sums"
    listing.write_text("".join(line + "\n" for line in sums(sound).splitlines() if file.name in line))
    assert run("check", file, "--contents", "--sha256", listing).code == 0


@pytest.mark.parametrize("option", [["--contents"], ["--sha256", "x"]])
def test_a_remote_model_has_no_bytes_to_read(run: Run, option: list[str]) -> None:
    ran = run("check", "org/name", *option)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "saccade: org/name: --contents and --sha256 read the files: download the model (`hf download`) and give its path\n"
    )


@pytest.mark.parametrize("options", [["--sha256", "/nowhere"], ["--contents", "--threads", "0"]])
def test_wrong_options_of_check_are_one_clear_line(run: Run, sound: Path, options: list[str]) -> None:
    ran = run("check", sound, *options)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("saccade: ") and options[-1] in ran.err


# What differs.

Specs = list[Spec]


def write(root: Path, specs: Specs | None = None, shard_bytes: int = 1 << 20, **changes: object) -> Path:
    config = small_config(**changes)
    return write_headers(root, config, specs or published(config, True), shard_bytes)


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("a"))


def test_equal_headers_are_equal(run: Run, a: Path, tmp_path: Path) -> None:
    ran = run("plan", a, "--diff", write(tmp_path))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == "equal in config.json, headers and plan; no tensor byte was read"


def as_bf16(specs: Specs, module: str) -> Specs:
    """A module in BF16, without its scale."""
    kept = [s for s in specs if not s[0].endswith(f"{module}.weight_scale_inv")]
    return [(n, "BF16", shape) if n.endswith(f"{module}.weight") else (n, d, shape) for n, d, shape in kept]


def change_dtype(specs: Specs, end: str, dtype: str) -> Specs:
    return [(n, dtype if n.endswith(end) else d, shape) for n, d, shape in specs]


def difference(run: Run, a: Path, b: Path, *options: str) -> dict[str, list[list[str]]]:
    """Of each kind the name and both sides, from the JSON."""
    ran = run("plan", a, "--diff", b, "--json", *options)
    data = json.loads(ran.out)
    assert (ran.code, data["equal"]) == (1, False)
    found: dict[str, list[list[str]]] = {}
    for d in data["differences"]:
        found.setdefault(d["kind"], []).append([d["name"], d["a"], d["b"]])
    return found


ALL_WK = [WK.replace("layers.1", f"layers.{i}") for i in range(4)]


def test_an_upcast_wk_differs_in_storage_but_not_in_what_is_held(run: Run, a: Path, tmp_path: Path) -> None:
    b = write(tmp_path, as_bf16(published(small_config(), True), "indexer.wk"))
    found = difference(run, a, b)
    assert found.pop("file")[-1][0] == "bytes"
    assert found == {
        "tensor": [[f"{wk}_scale_inv", "F32 [1, 2]", "absent"] for wk in ALL_WK],
        "dtype": [[wk, "F8_E4M3", "BF16"] for wk in ALL_WK],
        "encoding": [[wk, "FP8 128x128, _scale_inv in F32", "plain"] for wk in ALL_WK],
    }
    text = run("plan", a, "--diff", b).out
    name = WK.replace("layers.1", "layers.{0-3}")
    assert f"\ndtype of tensors (4)\n  {name} (4 of them): F8_E4M3 | BF16\n" in text
    assert f"\ntensors (4)\n  {name}_scale_inv (4 of them): F32 [1, 2] | absent\n" in text
    assert len(text.splitlines()) < 20


def test_what_the_engine_would_hold_differs_with_the_storage_of_a_projection(run: Run, a: Path, tmp_path: Path) -> None:
    b = write(tmp_path, as_bf16(published(small_config(), True), "o_proj"))
    held = difference(run, a, b)["held"]
    assert held[:2] == [
        ["model.layers.0.self_attn.o_proj", "F8_E4M3 [256, 256], 65536 B", "BF16 [256, 256], 131072 B"],
        ["model.layers.0.self_attn.o_proj.scale", "F32 [2, 2], 16 B", "absent"],
    ]
    assert len(held) == 8
    assert "held" not in difference(run, a, b, "--dtype", "float32")
    ranked = difference(run, a, b, "--tp", "2", "--rank", "1")["held"]
    assert ranked[0][1] == "F8_E4M3 [256, 128], 32768 B"


def test_the_dtype_of_scales_is_a_difference_of_encoding(run: Run, a: Path, tmp_path: Path) -> None:
    b = write(
        tmp_path,
        change_dtype(published(small_config(), True), "layers.1.self_attn.indexer.wk.weight_scale_inv", "F8_E8M0"),
    )
    found = difference(run, a, b)
    assert found["dtype"] == [[WK + "_scale_inv", "F32", "F8_E8M0"]]
    assert found["encoding"] == [[WK, "FP8 128x128, _scale_inv in F32", "FP8 128x128, _scale_inv in F8_E8M0"]]


def test_the_config_says_how_many_columns_codes_hold(run: Run, tmp_path: Path) -> None:
    layout = read_layouts()["17-w4afp8"]
    small = config_of(layout, small=True) | {"moe_intermediate_size": 128}
    made = make(layout, small)
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"
    a = write_raw(tmp_path / "a", small, made.tensors)
    made.tensors[name] = Raw("BF16", (256, 1), bf16_bits(made.tensors[name].data))
    b = write_raw(tmp_path / "b", small, made.tensors)
    coded = "INT4 g128 W4AFP8, _scale_inv in"
    expected = [name.removesuffix("_scale_inv"), f"{coded} F32", f"{coded} BF16"]
    assert difference(run, a, b)["encoding"] == [expected]


def test_a_lost_scale_makes_codes_unreadable_and_the_model_incomplete(run: Run, a: Path, tmp_path: Path) -> None:
    b = write(tmp_path, [s for s in published(small_config(), True) if s[0] != WK + "_scale_inv"])
    found = difference(run, a, b)
    assert found["encoding"] == [[WK, "FP8 128x128, _scale_inv in F32", "unreadable (missing-scale)"]]
    assert found["problem"] == [["of the proof", "0", "1"]]
    assert [h for h in found["held"] if h[2] == "absent"][0][0].endswith("layers.1.self_attn.indexer.wk_weights_proj")
    assert run("plan", a, "--diff", b).err == f"{b}: incomplete, 1 problem; `saccade check` names them\n"


def test_shapes_names_and_config_differ(run: Run, a: Path, tmp_path: Path) -> None:
    b = write(tmp_path, vocab_size=384, rope_scaling=None, routed_scaling_factor=2, eos_token_id=[1, 2])
    found = difference(run, a, b)
    assert found["shape"] == [
        [name, "[320, 256]", "[384, 256]"]
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    ]  # fmt: skip
    assert found["config"] == [
        ["vocab_size", "320", "384"],
        ["routed_scaling_factor", "2.5", "2"],
        ["rope_scaling", "absent", "null"],
        ["eos_token_id", "absent", "[1, 2]"],
    ]
    assert [h[0] for h in found["held"]][:1] == ["model.embed_tokens"]
    backwards = difference(run, b, a)
    for kind, differences in found.items():
        assert sorted(backwards[kind]) == sorted([name, y, x] for name, x, y in differences)


def test_nested_and_long_config_values_are_shown_by_what_differs(run: Run, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.gate" for i in range(60)]
    block = {"quant_method": "fp8", "modules_to_not_convert": names}
    b = block | {"modules_to_not_convert": names[:58] + ["lm_head"], "fmt": "e4m3"}
    found = difference(
        run, write(tmp_path / "a", quantization_config=block), write(tmp_path / "b", quantization_config=b)
    )
    assert found["config"] == [
        ["quantization_config.modules_to_not_convert", '60 items, only here: "model.layers.{58-59}.mlp.gate"', '59 items, only here: "lm_head"'],
        ["quantization_config.fmt", "absent", '"e4m3"'],
    ]  # fmt: skip


def test_another_division_into_files_is_named(run: Run, a: Path, tmp_path: Path) -> None:
    found = difference(run, a, write(tmp_path, shard_bytes=2 << 20))
    assert found.keys() == {"file"} and found["file"][0][0] == "count"
    assert found["file"][0][1] == str(len(list(a.glob("*.safetensors"))))


def test_the_bundled_model_is_compared_by_default_and_ids_are_fetched(
    run: Run, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is test_remote.py's; here a local model stands behind an id."""
    from saccade.checkpoint.open import bundled_path, open_raw

    assert run("plan", "--diff", bundled_path()).code == 0
    raw, source, index = open_raw(a)
    opened = raw, source, replace(index, root="org/name")
    monkeypatch.setattr("saccade.plan.diff.open_raw", lambda name, **_: opened)
    ran = run("plan", "org/name", "--diff", a)
    assert (ran.code, ran.err) == (0, f"fetched {opened[2].bytes_read:,} bytes of org/name\n")


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_cannot_be_opened_is_one_clear_error(run: Run, a: Path, tmp_path: Path, side: int) -> None:
    models = [a, a]
    models[side] = tmp_path / "nowhere"
    ran = run("plan", models[0], "--diff", models[1])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"saccade: {tmp_path}/nowhere: no such directory")


def test_differences_are_found_without_torch(a: Path, sound: Path) -> None:
    program = f"""
import sys
from saccade.cli.app import app
try:
    app(["plan", {str(a)!r}, "--diff", {str(sound)!r}])
except SystemExit as end:
    assert end.code == 1, end.code
assert "torch" not in sys.modules and "rich" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "dtype of tensors" not in ran.stdout and "files (2)" in ran.stdout
