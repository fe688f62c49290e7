"""What a conversion writes: the same parameters, the same bytes where nothing changes, and files that others load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoints import decode, small_config, small_tensors, write_small
from tiny_models import tiny_dict
from torch import Tensor
from transformers_models import FP8_CONFIGS, MODELS, draw_tokens, find_log_probs, write_fp8
from whole_checkpoints import parameters_of, same, tensors_of

from saccade.checkpoint.index import INDEX_FILE, Entry, read_index
from saccade.checkpoint.open import JOURNAL, bundled_path
from saccade.checkpoint.write import published_fp8, write_checkpoint
from saccade.cli.convert import show_conversion
from saccade.convert import stream
from saccade.convert.changes import Mode, OutputTensor, lay_out
from saccade.convert.convert import convert
from saccade.convert.others import find_others
from saccade.convert.report import Report

UPCAST, BF16, FP8 = Mode("upcast", ("indexer.wk",)), Mode("bf16"), Mode("fp8")
WK = "model.layers.{}.self_attn.indexer.wk.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 with power-of-two scales, shuffled over five files so that most scales lie apart from their codes; the last
    file holds scales alone."""
    config = small_config()
    root = tmp_path_factory.mktemp("model")
    write_small(
        root,
        config,
        small_tensors(config),
        lambda n: 4 if n.endswith("o_proj.weight_scale_inv") else len(n) % 4,
        seed=2,
    )
    (root / "tokenizer.json").write_text('{"a": 1}')
    (root / "README.md").write_bytes(b"# card \xff\x00")
    (root / "code" / "deep").mkdir(parents=True)
    (root / "code" / "deep" / "modeling.py").write_text("pass\n")
    (root / "code" / "old.safetensors").write_bytes(b"stray")
    (root / ".cache").mkdir()
    (root / ".cache" / "lock").write_text("")
    (root / ".gitattributes").write_text("*.safetensors lfs\n")
    for leftover in (".tokenizer.json.part", "code/.modeling.py.part", JOURNAL, f".{JOURNAL}.part"):
        (root / leftover).write_text("of a conversion that was cut short")
    (root / "vocabulary.part").write_text("mine")
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Report]]:
    folder = tmp_path_factory.mktemp("results")
    made = {}
    for start, mode in ((source, UPCAST), (source, BF16), (folder / "bf16", FP8)):
        made[mode.name] = (folder / mode.name, convert(start, folder / mode.name, mode, threads=3))
    return made


@pytest.mark.parametrize("mode", ["upcast", "bf16"])
def test_the_result_loads_to_the_same_parameters(
    mode: str, source: Path, results: dict[str, tuple[Path, Report]]
) -> None:
    root, report = results[mode]
    assert same(parameters_of(root, "float32"), parameters_of(source, "float32"))
    assert report.roundings == {}
    if mode == "upcast":  # nothing else is held otherwise than before
        assert same(parameters_of(root, "auto"), parameters_of(source, "auto"))


def test_upcast_changes_the_named_modules_and_nothing_else(
    source: Path, results: dict[str, tuple[Path, Report]]
) -> None:
    before, after = tensors_of(source), tensors_of(results["upcast"][0])
    wk = {WK.format(layer) for layer in range(4)}  # the MTP layer is number 3
    assert before.keys() - after.keys() == {name + "_scale_inv" for name in wk} and after.keys() <= before.keys()
    assert {n for n in after if not same({"": before[n]}, {"": after[n]})} == wk
    for name in wk:
        assert after[name].dtype == torch.bfloat16 and after[name].float().equal(decode(before, name))
    assert results["upcast"][1].changes == {"FP8 128x128 -> BF16": 4, "copied": len(after) - 4}


def test_bf16_decodes_every_code_and_copies_the_rest(source: Path, results: dict[str, tuple[Path, Report]]) -> None:
    before, after = tensors_of(source), tensors_of(results["bf16"][0])
    assert after.keys() == {n for n in before if not n.endswith("_scale_inv")}
    for name, t in after.items():
        if before[name].dtype == torch.float8_e4m3fn:
            assert t.dtype == torch.bfloat16 and t.float().equal(decode(before, name)), name
        else:
            assert same({"": t}, {"": before[name]}), name


def test_fp8_is_the_published_layout_of_the_bf16_tensors(results: dict[str, tuple[Path, Report]]) -> None:
    plain, root = tensors_of(results["bf16"][0]), results["fp8"][0]
    assert same(tensors_of(root), dict(published_fp8(plain.items())))
    quantization = json.loads((root / "config.json").read_text())["quantization_config"]
    modules = quantization.pop("modules_to_not_convert")
    assert quantization == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    stored = {n.removesuffix(".weight") for n, t in plain.items() if t.ndim == 2}
    coded = {n.removesuffix(".weight_scale_inv") for n in tensors_of(root) if n.endswith("_scale_inv")}
    assert set(modules) == stored - coded and "lm_head" in modules


def test_bf16_and_back_is_the_bundled_model_again(tmp_path: Path) -> None:
    """Number for number. Not code for code: where the largest of a block rounds down to 224 steps, half the scale does."""
    convert(None, tmp_path / "plain", BF16)
    convert(tmp_path / "plain", tmp_path / "again", FP8)
    assert tensors_of(tmp_path / "again").keys() == tensors_of(bundled_path()).keys()
    assert same(parameters_of(tmp_path / "again", "float32"), parameters_of(bundled_path(), "float32"))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (bundled_path() / "tokenizer.json").read_bytes()


def test_other_files_are_kept_and_strays_are_not(source: Path, results: dict[str, tuple[Path, Report]]) -> None:
    for root, _ in results.values():
        there = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        kept = {"tokenizer.json", "README.md", "code/deep/modeling.py", ".gitattributes", "vocabulary.part"}
        files = {f.name for f in read_index(root).files}
        assert there == kept | files | {"config.json", INDEX_FILE}
        assert all((root / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_nothing_of_a_conversion_that_was_cut_short_is_copied(source: Path) -> None:
    """Least of all its journal, which would take the place of the new one."""
    kept = [".gitattributes", "README.md", "code/deep/modeling.py", "tokenizer.json", "vocabulary.part"]
    left = (".cache/", "code/old.safetensors")
    found = find_others(source, frozenset({"config.json", *(p.name for p in source.glob("model*"))}), source / "out")
    assert (sorted(other.name for other in found.files), found.left_out) == (kept, left)


def test_each_file_has_its_sources_name_and_one_of_dropped_scales_has_none(
    source: Path, results: dict[str, tuple[Path, Report]]
) -> None:
    names = [f.name for f in read_index(source).files]
    assert [f.name for f in read_index(results["upcast"][0]).files] == names
    assert [f.name for f in read_index(results["bf16"][0]).files] == names[:-1]  # the last held scales alone
    listing = json.loads((results["bf16"][0] / INDEX_FILE).read_text())
    total = sum(t.numel() * t.element_size() for t in tensors_of(results["bf16"][0]).values())
    assert listing["metadata"] == {"total_size": total}
    assert {n: e.file for n, e in read_index(results["bf16"][0]).entries.items()} == listing["weight_map"]


def test_a_file_without_changes_is_copied_whole(source: Path, results: dict[str, tuple[Path, Report]]) -> None:
    last = read_index(source).files[-1].name
    assert (source / last).read_bytes() == (results["upcast"][0] / last).read_bytes()


def test_tensors_lie_on_multiples_of_their_element() -> None:
    kinds = (("odd", "U8", (3, 3)), ("bf16", "BF16", (5,)), ("f32", "F32", (2,)), ("scalar", "F32", ()))
    items = [
        OutputTensor(n, dtype, shape, "copy", Entry(n, dtype, shape, "f", 0, 0), None) for n, dtype, shape in kinds
    ]
    output = lay_out("f", items, {"format": "pt"})
    assert all(i.start % {"F32": 4, "BF16": 2, "U8": 1}[i.dtype] == 0 for i in output.items)
    assert output.size == len(output.header) + 9 + 10 + 8 + 4 == output.items[-1].stop


def test_metadata_of_the_files_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "m"
    config = small_config()
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    save_file(small_tensors(config), root / "model.safetensors", metadata={"format": "pt", "note": "ä"})
    convert(root / "model.safetensors", tmp_path / "out", BF16)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "ä"}
    assert not (tmp_path / "out" / INDEX_FILE).exists()  # a checkpoint of one file stays one


def test_scales_that_are_no_powers_of_two_round_once_and_are_reported(tmp_path: Path) -> None:
    config = small_config()
    tensors = small_tensors(config, power_of_two=False)
    write_small(tmp_path / "m", config, tensors)
    report = convert(tmp_path / "m", tmp_path / "out", BF16)
    coded = {n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert report.roundings.keys() == coded
    assert 2**-10 < max(report.roundings.values()) <= 2**-8
    after = tensors_of(tmp_path / "out")
    assert all(after[n].equal(decode(tensors, n).bfloat16()) for n in coded)


def test_names_in_the_report_are_in_order_and_folded(tmp_path: Path) -> None:
    config = small_config(n_routed_experts=12, num_hidden_layers=2, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(config, power_of_two=False).items() if "layers.2." not in n}
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    for expert in range(12):
        given[name.format(expert)].view(torch.uint8)[0, 0] = 0x7F  # NaN
    write_small(tmp_path / "m", config, given, lambda n: -len(n) % 3, seed=3)
    report = convert(tmp_path / "m", tmp_path / "out", BF16, threads=2)
    experts = [name.format(i) for i in range(12)]
    assert [n for n in report.roundings if "experts" in n and "down" in n and "shared" not in n] == experts
    assert list(report.not_finite) == experts and list(report.changes) == sorted(report.changes)
    text = show_conversion(report, None)
    assert "see `saccade check --contents`: model.layers.1.mlp.experts.{0-11}.down_proj.weight\n" in text
    assert "of a value at most: model.layers.0.mlp.down_proj.weight; model.layers.0.mlp.gate_proj.weight; " in text


def test_a_plain_f32_matrix_becomes_bf16_where_the_model_holds_it_so(tmp_path: Path) -> None:
    config = small_config()
    given = small_tensors(config)
    tensors = {n: decode(given, n) for n in given if not n.endswith("_scale_inv")}
    write_small(tmp_path / "m", config, tensors)
    convert(tmp_path / "m", tmp_path / "out", BF16)
    after = tensors_of(tmp_path / "out")
    floats = {n for n, t in after.items() if t.dtype == torch.float32}
    assert {n for n in after if after[n].ndim == 1} <= floats  # norms and biases
    assert {n for n in floats if after[n].ndim == 2} == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2, 3)}
    assert same(parameters_of(tmp_path / "out", "auto"), parameters_of(tmp_path / "m", "auto"))


def test_small_pieces_and_many_groups_of_scales_change_nothing(
    source: Path, results: dict[str, tuple[Path, Report]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WRITE_BUFFER", 3000)
    monkeypatch.setattr(stream, "COPY_BUFFER", 5000)
    monkeypatch.setattr(stream, "HELD_SCALE_BYTES", 100)
    for start, mode in ((source, BF16), (results["bf16"][0], FP8)):
        convert(start, tmp_path / mode.name, mode, threads=4)
        assert same(tensors_of(tmp_path / mode.name), tensors_of(results[mode.name][0]))


def test_memory_is_bounded_by_the_reported_figure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces handed out are no larger than the bound allows for, however large the tensors."""
    seen = []
    read = stream.read_rows

    def spy(index: object, ranges: object, consume: object, threads: int, size: int, progress: object) -> None:
        def watch(name: str, rows: Tensor, first: int) -> None:
            seen.append(rows.numel() * rows.element_size())
            consume(name, rows, first)  # type: ignore[operator]

        read(index, ranges, watch, threads, size, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "read_rows", spy)
    monkeypatch.setattr(stream, "WRITE_BUFFER", 4096)
    monkeypatch.setattr(stream, "COPY_BUFFER", 8192)
    monkeypatch.setattr(stream, "SCAN_BUFFER", -stream.TEMPORARIES)  # of the scales that are judged beforehand
    two = convert(source, tmp_path / "two", BF16, threads=2)
    assert max(seen) <= 8192
    eight = convert(source, tmp_path / "eight", BF16, threads=8)
    assert eight.memory_bound - two.memory_bound == 6 * 4096 * stream.PER_BYTE


@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_transformers_loads_the_bf16_result_with_equal_logits(name: str, tmp_path: Path) -> None:
    oracle = write_fp8(tmp_path / "m", tiny_dict(**FP8_CONFIGS[name]), power_of_two=True)
    convert(tmp_path / "m", tmp_path / "out", BF16)
    loader = MODELS[tiny_dict(**FP8_CONFIGS[name])["model_type"]][1]
    loaded, info = loader.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    tokens = draw_tokens(100, seed=6)
    assert find_log_probs(loaded.eval(), tokens).equal(find_log_probs(oracle, tokens))


def test_progress_ends_at_its_total(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", UPCAST, threads=2, progress=lambda done, total: told.append((done, total)))
    assert told and all(a[0] <= b[0] for a, b in zip(told, told[1:], strict=False) if a[1] == b[1]) or len(told) < 4
    assert max(done for done, _ in told) == pytest.approx(told[0][1], rel=0.05)


def test_a_shared_layers_own_indexer_is_converted_too(tmp_path: Path) -> None:
    """Nothing reads it, but in a model without quantization_config it must not stay FP8."""
    config = small_config(indexer_types=["full", "shared", "full"])
    given = small_tensors(small_config())
    write_small(tmp_path / "m", config, given)
    convert(tmp_path / "m", tmp_path / "out", BF16)
    after = tensors_of(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.float32}
    assert after[WK.format(1)].float().equal(decode(given, WK.format(1)))


def test_a_checkpoint_of_ours_in_one_file(tmp_path: Path) -> None:
    config = small_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(small_config(num_hidden_layers=2)).items() if "layers.2." not in n}
    write_checkpoint(tmp_path / "m", config, given.items())
    convert(tmp_path / "m", tmp_path / "out", UPCAST)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert same(parameters_of(tmp_path / "out", "auto"), parameters_of(tmp_path / "m", "auto"))


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    config = small_config()
    tensors = small_tensors(config)
    wk, norm = "model.layers.1.self_attn.indexer.wk.weight", "model.layers.0.self_attn.o_proj.weight"
    for name in (wk, norm):
        tensors[name].view(torch.uint8)[3, 5] = 0x7F  # NaN
    write_small(tmp_path / "a", config, tensors)
    report = convert(tmp_path / "a", tmp_path / "b", Mode("bf16"), threads=1)
    assert report.not_finite == (norm, wk)
    text = show_conversion(report, None)
    assert "not finite" in text and wk in text and "2 tensors rounded" not in text
    assert "every finite number is the same as before" in text
