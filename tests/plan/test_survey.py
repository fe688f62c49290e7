"""The survey's 41 ways in which engines failed to load DSA checkpoints, and the test that shows each cannot happen here.

A row is what happened elsewhere, and the tests that show such a checkpoint loaded right or refused before a tensor byte
is read: file::function, or file::function[case]. A row that no test of a checkpoint can show says why.
"""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

WRONG_TENSORS = "test_faults.py::test_wrong_tensors_are_named"
WRONG_FILES = "test_faults.py::test_wrong_files_are_named"
FUSED = "test_weights.py::test_fused_parameter_equals_an_independent_decode_bit_for_bit"
ANY_ORDER = "test_weights.py::test_any_order_over_any_calls_with_reused_buffers_gives_the_same_bytes"
UNFINISHED = "test_weights.py::test_finish_names_what_has_not_come"
WRONG_STEP = "test_plan.py::test_a_step_that_would_load_wrong_numbers_is_refused"
BLOCK = "test_misleading.py::test_what_quantization_config_says_changes_no_step"
MIXED = "test_misleading.py::test_each_tensor_is_taken_as_it_is_stored_whatever_its_neighbours_are"
NAMES = "test_misleading.py::test_names_that_the_model_does_not_have_are_never_skipped"
SHARED = "test_misleading.py::test_layers_that_share_a_selection_load_with_and_without_an_indexer_in_the_file"
LAYOUT = "test_layouts.py::test_a_layout_loads_to_an_independent_decode_bit_for_bit"
PER_CHANNEL, MXFP8 = f"{LAYOUT}[10-mxfp4-fp8-per-channel]", f"{LAYOUT}[12-mxfp8-nvfp4]"
NVFP4, PACKED, INT8 = f"{LAYOUT}[05-nvfp4-everywhere]", f"{LAYOUT}[19-fp8-packed-ue8m0]", f"{LAYOUT}[18-int8]"
RENAMED, CT = f"{LAYOUT}[11-fp8-renamed]", f"{LAYOUT}[14-mxfp4-fp8-compressed-tensors]"

# Files of tests that may be absent where a part of the project is taken alone; where they are there, they are checked.
ELSEWHERE: set[str] = set()

Row = tuple[str, tuple[str, ...]]

# The pair of wk and its scale, and the parameter that they are fused into.
PAIR: dict[int | str, Row] = {
    1: ("a fusion for BF16 alone broke FP8 checkpoints, of which one part has a scale and the other none", (FUSED,)),
    2: ("what waited for its partner was a view of a buffer that was used again", (ANY_ORDER,)),
    3: ("weight and scale came in different calls, and what waited was forgotten between them", (ANY_ORDER, "test_weights.py::test_a_partly_fed_tensor_is_missing")),
    4: ("a scale of another shape: [out], [out, 1], [out, in/32]", (PER_CHANNEL, MXFP8, CT, "test_fuzz.py::test_hostile_files_are_refused_by_name_or_read_as_their_bytes_say")),
    5: ("FP8 codes were copied into a float parameter, their scale dropped", (f"{WRONG_STEP}[codes into floats]", f"{WRONG_STEP}[codes without their scale]", f"{WRONG_TENSORS}[lost scale]", FUSED)),
    6: ("the scale is called weight_scale", (RENAMED, f"{WRONG_TENSORS}[renamed scale]")),
    7: ("block FP8 with a scale called weight_scale was refused, then loaded without it", (RENAMED, f"{LAYOUT}[07-nvfp4-fp8-compressed-tensors]",)),
    8: ("scales were skipped before names were mapped, so the MTP layer ran without", (f"{WRONG_TENSORS}[scale of the MTP layer's wk lost]", FUSED, f"{NAMES}[a scale of a kept weight]")),
    9: ("an E8M0 scale of wk was not recognised, and the MTP layer stayed at its defaults", (MXFP8, f"{LAYOUT}[21-mxfp8-hunyuan]", UNFINISHED)),
    10: ("a sync pushed packed scales, and BF16 into an FP8 parameter", (PACKED, f"{WRONG_TENSORS}[scale beside plain numbers]", "test_weights.py::test_feed_refuses_repeated_unknown_and_wrong_tensors_at_once", "test_push.py::test_a_push_that_cannot_be_proven_changes_nothing")),
    11: ("an INT8 wk was taken for a plain one", (INT8,)),
    12: ("one backend had no fused parameter", ("not the file's doing: all backends take the same parameters, see", "test_plan.py::test_wk_weights_proj_is_one_bf16_parameter_in_every_layer")),
    13: ("wk was fused into a matrix of a lower format than its own", ("test_plan.py::test_wk_weights_proj_is_one_bf16_parameter_in_every_layer", f"{MIXED}[wk alone]")),
    14: ("(a good example) an incomplete wk is an error at the end of the load", (UNFINISHED, f"{WRONG_TENSORS}[lost pair]")),
    "0-D scale": ("a scale for a whole tensor was indexed", (f"{LAYOUT}[04-nvfp4-modelopt]",)),
    "weight_scale_2": ("a second scale overwrote the first, as its name begins alike", (NVFP4,)),
    "4-bit wk": ("NVFP4 or INT8 codes of wk fell through to the plain path", (NVFP4, INT8, f"{WRONG_TENSORS}[raw bytes in place of FP8]", f"{WRONG_TENSORS}[integers]")),
    "block by division": ("the block size came from a division that ragged edges break", (f"{WRONG_TENSORS}[floored scale rows]", f"{WRONG_TENSORS}[scale of another block size]", "test_misleading.py::test_ragged_scales_reach_the_last_row")),
    "no check at the end": ("parameters that nothing wrote were run", (UNFINISHED, "test_weights.py::test_loading_over_ff_and_over_00_gives_identical_bytes")),
    "FP8 wk in a layer without an indexer": ("it was looked up among parameters that are not there", (SHARED,)),
}  # fmt: skip

# Names, exclude lists, prefixes.
NAMED: dict[int | str, Row] = {
    15: ("the exclude list names indexers_proj, so weights_proj went to an FP8 GEMM", (f"{BLOCK}[GLM-5-FP8, indexers_proj]", f"{NAMES}[indexers_proj]")),
    16: ("the same name decided how a scale is sharded: every rank held everything", (f"{BLOCK}[GLM-5-FP8, indexers_proj]", "test_plan.py::test_all_ranks_of_a_model_are_proven_together")),
    17: ("exclude names did not match the fused shared experts", (f"{BLOCK}[Quark, shared experts not excluded]", f"{MIXED}[shared experts beside FP8 routed ones]")),
    18: ("a BF16 MTP layer was built as 4-bit: the exclude list has another prefix, or not the layer", (f"{BLOCK}[Quark, runtime prefix of the MTP layer]", f"{MIXED}[the MTP layer]", f"{NAMES}[MTP layer with a runtime prefix]")),
    19: ("names begin with model.language_model.", (f"{NAMES}[names with `language_model.`]", "test_flash_checkpoint.py::test_a_text_model_alone_is_the_same")),
    20: ("fused modules took the scheme of one of their parts", (f"{MIXED}[one half of each fused matrix]", f"{MIXED}[the indexer and kv_b_proj, as in GLM-5.3-Flash]")),
    21: ("weights_proj was built with a bias that no file has", ("test_misleading.py::test_a_matrix_kept_without_its_bias_needs_none", f"{NAMES}[a bias of weights_proj]")),
    22: ("names of save_pretrained: 97 % of the weights were skipped in silence", (f"{NAMES}[names without `model.`]", f"{NAMES}[stacked experts]")),
    23: ("fused quantised names were dropped with a log line", (f"{NAMES}[stacked experts]", f"{NAMES}[a fused wk_weights_proj]")),
    24: ("attention was taken for NVFP4: exclude came as globs, or as another key", (f"{BLOCK}[ModelOpt, exclude_modules]", f"{BLOCK}[ModelOpt, ignore]")),
}  # fmt: skip

# Shared layers, the MTP layer, missing tensors, files.
MISSING: dict[int | str, Row] = {
    25: ("shared layers ship no indexer: 399 parameters were missing", (f"{SHARED}[False]",)),
    26: ("shared layers do ship an indexer: unexpected keys", (f"{SHARED}[True]",)),
    27: ("a converter put an indexer on every layer, and 57 of 78 chose for themselves", (f"{SHARED}[True]", "test_config.py::test_glm52_shares_selections_from_21_layers", "test_misleading.py::test_a_gguf_is_not_taken_for_a_checkpoint")),
    28: ("the MTP layer reused the main model's selection", ("test_plan.py::test_wk_weights_proj_is_one_bf16_parameter_in_every_layer", "test_model.py::test_the_mtp_layer_equals_a_block_of_transformers")),
    29: ("index.json did not list the file of the MTP layer", ("test_misleading.py::test_an_mtp_layer_in_a_file_that_no_index_lists_is_loaded", "test_misleading.py::test_half_of_an_mtp_layer_is_refused")),
    30: ("the MTP layer's embedding and head are not in the file", ("test_misleading.py::test_an_mtp_layer_without_embedding_and_head_uses_the_main_ones",)),
    31: ("the scale rows of 576 rows were floored: the last one stayed unset", ("test_misleading.py::test_ragged_scales_reach_the_last_row", f"{WRONG_TENSORS}[floored scale rows]")),
    32: ("a missing shard: uninitialised weights were run", (f"{WRONG_FILES}[missing shard]", "test_index.py::test_a_missing_shard_is_named_with_how_much_it_holds")),
    33: ("the record of what was loaded knew nothing of quantised layers", (UNFINISHED, "test_weights.py::test_weights_are_taken_once_and_none_is_left")),
    34: ("slots for scales were never written", ("test_weights.py::test_loading_over_ff_and_over_00_gives_identical_bytes", f"{NAMES}[a scale of a kept weight]", NVFP4)),
    35: ("truncated shards read as zeros", (f"{WRONG_FILES}[truncated file]", "test_read.py::test_a_file_cut_since_its_header_was_read_is_named")),
    36: ("copies in folders and stale lists were loaded too", ("test_misleading.py::test_copies_in_folders_and_stale_lists_are_not_read", f"{WRONG_FILES}[one name in three files]")),
    37: ("a conversion script left the indexer out", ("test_convert.py::test_bf16_decodes_every_code_and_copies_the_rest", "test_convert.py::test_a_shared_layers_own_indexer_is_converted_too")),
    38: ("drafts were made from the wrong hidden state", ("not the file's doing: the forward pass, see", "test_model.py::test_the_mtp_layer_equals_a_block_of_transformers", "test_engine.py::test_drafts_change_the_number_of_steps_and_not_the_tokens")),
    39: ("more buffers used again; a loader without quant_config", (ANY_ORDER, "test_weights.py::test_every_parameter_equals_an_independent_decode")),
    40: ("MXFP8 was taken by the 128x128 loader; static activations were accepted and run dynamic", (MXFP8, f"{BLOCK}[another block size]", f"{BLOCK}[static activations]", f"{WRONG_TENSORS}[scale of another block size]")),
    41: ("AWQ has no .weight; a group of any name; a scale [out, 1]", (f"{NAMES}[AWQ]", f"{BLOCK}[compressed-tensors, any name of a group]", CT, PER_CHANNEL)),
}  # fmt: skip

ROWS: dict[int | str, Row] = PAIR | NAMED | MISSING


@functools.cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def is_there(test: str) -> bool:
    """Whether file::function[case] names a test: the file has that function, and that case as a literal."""
    file, _, rest = test.partition("::")
    name, _, case = rest.partition("[")
    paths = list(TESTS.rglob(file))  # two rooms may have files of one name
    if not paths:
        return file in ELSEWHERE
    path = next((path for path in paths if not rest or name in functions_of(path)), None)
    if path is None:
        return False
    case = case.removesuffix("]")
    is_header = (TESTS / "headers" / f"{case}.txt").exists()  # a layout is a file
    return case in ("", "True", "False") or is_header or f'"{case}":' in path.read_text()


def test_every_row_of_the_survey_is_here() -> None:
    assert [row for row in ROWS if isinstance(row, int)] == list(range(1, 42))
    assert all(what and shown for what, shown in ROWS.values())


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_tests_that_exist(row: int | str) -> None:
    tests = [shown for shown in ROWS[row][1] if not shown.startswith("not the file's doing")]
    assert tests and [test for test in tests if not is_there(test)] == []


def test_a_name_that_is_not_there_is_noticed() -> None:
    assert is_there(f"{WRONG_TENSORS}[lost scale]")
    for wrong in (f"{WRONG_TENSORS}[lost sail]", "test_faults.py::test_nothing", "test_no_such_file.py::test_x"):
        assert not is_there(wrong)
