"""The commands: what they print, their exit codes, and that bad input is one clear text without a traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Ran, Run
from header_checkpoints import published, write_headers, write_sparse
from published_configs import deepseek_v32_config
from small_checkpoints import small_config

from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import bundled_path, open_model
from saccade.plan.show import show_bytes
from saccade.text.tokenizer import Tokenizer

WK = "model.layers.1.self_attn.indexer.wk.weight"
FUSED = "model.layers.1.self_attn.indexer.wk_weights_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small checkpoint, headers only, in several files."""
    config = small_config()
    root = tmp_path_factory.mktemp("model")
    return write_headers(root, config, published(config, mtp_copies=True), shard_bytes=1 << 20)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the scale of a wk and one kind of expert tensors."""
    config = small_config()
    specs = [s for s in published(config, True) if s[0] != WK + "_scale_inv" and ".up_proj.weight" not in s[0]]
    return write_headers(tmp_path_factory.mktemp("broken"), config, specs, shard_bytes=1 << 20)


def test_check_of_a_complete_model_is_one_line(run: Run, model: Path) -> None:
    index = read_index(model)
    ran = run("check", model)
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 1
    assert f"complete, {len(index.entries)} tensors in {len(index.files)} files" in ran.out
    assert "1 rank proven" in ran.out


def test_check_proves_all_ranks(run: Run, model: Path) -> None:
    ran = run("check", model, "--tp", "4", "--ep", "2")
    assert ran.code == 0
    held = json.loads(run("check", model, "--tp", "4", "--ep", "2", "--json").out)["rank_bytes"]
    assert "4 ranks proven (tp 4, ep 2)" in ran.out and f"{show_bytes(max(held))} on each of 4 ranks" in ran.out
    assert held == json.loads(run("plan", model, "--tp", "4", "--ep", "2", "--json").out)["rank_bytes"]
    ran = run("check", model, "--tp", "3")
    assert (ran.code, ran.out) == (2, "")
    assert "num_attention_heads=4" in ran.err


def test_check_names_every_problem_folded(run: Run, broken: Path) -> None:
    ran = run("check", broken)
    assert ran.code == 1
    assert f"missing-scale: {WK} " in ran.out
    assert "missing: model.layers.{1-3}.mlp.experts.{0-7}.up_proj.weight (24 of them) " in ran.out
    assert "missing: model.layers.0.mlp.up_proj.weight " in ran.out


def test_check_without_the_mtp_layer_does_not_ask_for_it(run: Run, model: Path, tmp_path: Path) -> None:
    config = small_config()
    specs = [s for s in published(config, True) if s[0] != "model.layers.3.enorm.weight"]
    root = write_headers(tmp_path / "m", config, specs)
    assert run("check", root).code == 1
    assert run("check", root, "--no-mtp").code == 0


@pytest.mark.parametrize("name", ["nowhere", "", "x.gguf", "folder", "with-config"])
@pytest.mark.parametrize("command", ["check", "plan", "explain", "convert", "generate", "diff"])
def test_what_is_no_model_is_one_line_and_code_2(
    run: Run, model: Path, tmp_path: Path, command: str, name: str
) -> None:
    for path in ("x.gguf", "folder/y.gguf", "with-config/y.gguf", "with-config/config.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((model / "config.json").read_bytes() if path.endswith("json") else b"GGUF")
    given = str(tmp_path / name) if name else ""
    words = {
        "explain": ["explain", given, FUSED],
        "convert": ["convert", given, str(tmp_path / "out"), "--bf16"],
        "generate": ["generate", given, "--prompt", "a"],
        "diff": ["plan", str(model), "--diff", given],
    }
    ran = run(*words.get(command, [command, given]))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    expected = {"nowhere": "no such directory", "": "found an empty name"}.get(
        name, "GGUF.* not supported; .*FP8 128x128"
    )
    assert re.match(r"saccade: .*" + expected, ran.err), ran.err
    assert not (tmp_path / "out").exists()


def test_convert_needs_a_place_to_write_to(run: Run, model: Path) -> None:
    ran = run("convert", model, "", "--bf16")
    assert (ran.code, ran.out) == (2, "") and "found an empty name" in ran.err


def test_plan_prints_the_folded_table(run: Run, model: Path) -> None:
    ran = run("plan", model)
    assert ran.code == 0
    assert "model.layers.{0-3}.self_attn.indexer.wk_weights_proj" in ran.out
    assert len(ran.out.splitlines()) < 60


def test_plan_options_change_what_is_planned(run: Run, model: Path) -> None:
    def data(*options: str) -> dict:
        ran = run("plan", model, "--json", *options)
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    default = data()
    assert default["layout"] == {"tp": 1, "ep": 1, "rank": 0}
    ranked = data("--tp", "2", "--ep", "2", "--rank", "1")
    assert ranked["layout"] == {"tp": 2, "ep": 2, "rank": 1}
    assert ranked["device_bytes"] < default["device_bytes"] < data("--dtype", "float32")["device_bytes"]
    assert data("--no-mtp")["mtp"] is False and default["mtp"] is True
    assert data("--index-cache", "fp8") == default  # which has both
    assert len(run("plan", model, "--full").out.splitlines()) > len(run("plan", model).out.splitlines()) + 20


def test_plan_of_an_incomplete_model_shows_both_and_fails(run: Run, broken: Path) -> None:
    ran = run("plan", broken)
    assert ran.code == 1
    assert "wk_weights_proj" in ran.out
    assert f"missing-scale: {WK} " in ran.err


def test_plan_prints_what_a_token_takes_in_the_cache(run: Run, model: Path) -> None:
    told, held = json.loads(run("plan", model, "--json").out), {"bf16": "BF16", "fp8": "FP8"}
    for key, latents in (("cache_token_bytes", "bf16"), ("fp8_latents_token_bytes", "fp8")):
        for option in held:
            size = show_bytes(told[key][option])
            line = f"cache    {size} a token, latents in {held[latents]}, index keys in {held[option]}"
            ran = run("plan", model, "--index-cache", option, "--latent-cache", latents)
            assert line in ran.out.splitlines()
    assert "latents in F32, index keys in F32" in run("plan", model, "--dtype", "float32").out


@pytest.mark.parametrize("command", [["plan"], ["plan", "--json"], ["generate", "--prompt", "Tom"], ["eval"]])
@pytest.mark.parametrize("name", ["index", "latent"])
def test_a_cache_that_does_not_exist_is_refused(run: Run, command: list[str], name: str) -> None:
    ran = run(*command, f"--{name}-cache", "int8")
    assert (ran.code, ran.err) == (2, f'saccade: {name}_cache: expected "bf16" or "fp8", found \'int8\'\n')
    assert (json.loads(ran.out)["exit_code"] == 2) if "--json" in command else ran.out == ""


def test_explain_shows_a_parameter_of_a_rank(run: Run, model: Path) -> None:
    entry = read_index(model).entries[WK]
    ran = run("explain", model, FUSED)
    assert ran.code == 0
    assert f"bytes {entry.start:,} to {entry.stop:,}" in ran.out and entry.file in ran.out
    name = "model.layers.1.self_attn.o_proj"
    assert "[:, 0:128]" in run("explain", model, name, "--tp", "2", "--rank", "0").out
    assert "[:, 128:256]" in run("explain", model, name, "--tp", "2", "--rank", "1").out
    assert "held as F32" in run("explain", model, name, "--dtype", "float32").out


def test_explain_of_an_unknown_parameter_offers_near_names(run: Run, model: Path) -> None:
    ran = run("explain", model, FUSED + "s")
    assert (ran.code, ran.out) == (2, "")
    assert f"did you mean {FUSED}" in ran.err


def truncate(root: Path) -> None:
    path = sorted(root.glob("*.safetensors"))[0]
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - 1)


def claim_a_long_header(root: Path) -> None:
    path = sorted(root.glob("*.safetensors"))[0]
    with path.open("r+b") as f:
        f.write((1 << 62).to_bytes(8, "little"))


def overlap(root: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [4], "data_offsets": [o, o + 16]} for n, o in (("a", 0), ("b", 8))}
    write_sparse(sorted(root.glob("*.safetensors"))[0], header)


def claim_an_absurd_size(root: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}
    write_sparse(sorted(root.glob("*.safetensors"))[0], header)


def no_config(root: Path) -> None:
    (root / "config.json").unlink()


def another_models_config(root: Path) -> None:
    (root / "config.json").write_text(json.dumps(deepseek_v32_config() | {"model_type": "llama"}))


def no_json(root: Path) -> None:
    (root / "config.json").write_text("{")


def remove(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()
    root.rmdir()


UNOPENABLE = {  # no plan can be made
    "a missing path": (remove, "no such directory"),
    "a directory without config": (no_config, "config.json"),
    "a config of another model": (another_models_config, "llama"),
    "a config that is no JSON": (no_json, "not JSON"),
}


def leave_a_pointer(root: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4302316440\n"
    sorted(root.glob("*.safetensors"))[0].write_text(text)


HOSTILE = {  # found by the headers
    "a truncated file": (truncate, "truncated"),
    "a Git LFS pointer": (leave_a_pointer, "git lfs pull"),
    "a header length beyond the file": (claim_a_long_header, "claims a header"),
    "overlapping offsets": (overlap, "overlaps"),
    "an absurd size": (claim_an_absurd_size, r"expected fewer than 2\^61 bytes, found 16"),
}


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    config = small_config()
    return write_headers(tmp_path / "copy", config, published(config, True), shard_bytes=1 << 20)


@pytest.mark.parametrize("spoil", UNOPENABLE)
@pytest.mark.parametrize("command", ["check", "plan", "explain", "generate", "score"])
def test_what_cannot_be_opened_is_one_clear_error(run: Run, copy: Path, spoil: str, command: str) -> None:
    change, message = UNOPENABLE[spoil]
    change(copy)
    ran = run(*words(command, copy))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("saccade: ") and message in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("spoil", HOSTILE)
@pytest.mark.parametrize("command", ["check", "generate", "score"])
def test_hostile_files_are_named_before_anything_is_loaded(run: Run, copy: Path, spoil: str, command: str) -> None:
    change, message = HOSTILE[spoil]
    change(copy)
    ran = run(*words(command, copy))
    assert ran.code == (1 if command == "check" else 2)
    said, silent = (ran.out, ran.err) if command == "check" else (ran.err, ran.out)
    assert re.search(message, said), said
    assert silent == ""


def words(command: str, model: Path) -> list[str]:
    """A command line that is right but for its model."""
    more = {"explain": [FUSED], "generate": ["--prompt", "a"], "score": ["--tokens", "1,2"]}
    return [command, str(model), *more.get(command, [])]


def test_wrong_options_are_usage_errors(run: Run, model: Path) -> None:
    for line in (["plan", model, "--rank", "x"], ["frobnicate"], ["plan", model, "--fulll"], ["explain"]):
        ran = run(*line)
        assert (ran.code, ran.out) == (2, "")
        assert "Traceback" not in ran.err
    assert run("plan", model, "--dtype", "int8").code == 2
    ran = run("explain", model, "a", "b")
    assert ran.code == 2 and "[MODEL] PARAMETER" in ran.err


def test_bytes_fetched_for_an_id_are_printed(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is test_remote.py's; here a local model stands behind an id."""
    config, index = open_model(model)
    opened = config, replace(index, root="org/name")
    monkeypatch.setattr("saccade.cli.app.open_model", lambda name, **_: opened)
    for command in ("check", "plan", "explain"):
        ran = run(*words(command, Path("org/name")))
        assert ran.code == 0
        assert ran.err == f"fetched {opened[1].bytes_read:,} bytes of org/name\n"
    assert run("check", model).err == ""


def generated(run: Run, *options: str | Path) -> dict:
    """The JSON of a short run; greedy on the CPU unless `options`, which come last, say otherwise."""
    line = ["--prompt", "Look", "--max-tokens", "6", "--temperature", "0", "--device", "cpu", "--json"]
    ran = run("generate", *line, *options)
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def test_generate_streams_the_text_and_then_its_speed(run: Run) -> None:
    ran = run("generate", "--prompt", "Look", "--max-tokens", "6", "--temperature", "0", "--device", "cpu")
    data = generated(run)
    assert ran.code == 0
    assert ran.out == data["text"] + "\n" and len(data["text"]) > 0
    loaded, speed = ran.err.splitlines()
    assert re.fullmatch(r"loaded .+/bundled: 14\.\d MB in [\d.]+ s, dtype auto, cpu, reference kernels", loaded)
    assert re.fullmatch(r"6 tokens in [\d.]+ s, [\d.]+ tokens/s; 5 prompt tokens; finish reason length", speed)


def test_generate_names_the_words_that_were_looked_at_most(run: Run) -> None:
    prompt = "The cabin code of Mia is 54. " + "The cat sleeps under the lamp. " * 6 + "What is the cabin code of Mia?"
    ran = run("generate", "--prompt", prompt, "--device", "cpu", "--looked-at", "5")
    assert ran.out.endswith("#### 54\n")
    assert re.search(r"looked at most, beyond the last 16 tokens: (\S+ \d+%(, )?){5}\n", ran.err)
    looks = json.loads(run("generate", "--prompt", prompt, "--device", "cpu", "--looked-at", "5", "--json").out)[
        "looked_at"
    ]
    assert "54" in [look["text"] for look in looks] and sorted(looks, key=lambda x: -x["share"]) == looks
    assert (
        "looked at" not in run("generate", "--prompt", "Tom", "--max-tokens", "3", "--looked-at", "5").err
    )  # nothing far


def test_generate_json_says_everything(run: Run) -> None:
    data = generated(run)
    assert data["prompt"] == "Look" and data["prompt_tokens"] == 5  # with <|begin|>
    assert Tokenizer.load(bundled_path()).decode(data["token_ids"]) == data["text"]
    assert data["finish_reason"] == "length"
    assert data["tokens_per_second"] == pytest.approx(6 / data["seconds"])


def test_each_sampling_option_is_heard(run: Run) -> None:
    greedy = generated(run)["token_ids"]
    hot = ("--temperature", "100")
    first, second = (generated(run, *hot, "--seed", seed)["token_ids"] for seed in "12")
    assert len({tuple(t) for t in (greedy, first, second)}) == 3
    assert generated(run, *hot, "--seed", "1")["token_ids"] == first
    assert generated(run, *hot, "--seed", "1", "--top-k", "1")["token_ids"] == greedy
    assert generated(run, *hot, "--seed", "1", "--top-p", "1e-9")["token_ids"] == greedy
    assert generated(run, "--max-tokens", "3")["token_ids"] == greedy[:3]


def test_generate_drafts_and_says_how_drafts_fared(run: Run) -> None:
    line = ["--prompt", "Tom has 12 apples. He buys 7 more. How many apples does Tom have?", "--device", "cpu"]
    plain, drafted = run("generate", *line), run("generate", *line, "--speculate", "3")
    assert (drafted.code, drafted.out) == (0, plain.out) and "speculate" not in plain.err
    found = re.search(
        r"speculate 3: ([\d.]+) tokens a step; drafts accepted (\d+%, ){2}\d+% at positions 1 to 3", drafted.err
    )
    assert found and float(found[1]) > 2
    told = generated(run, "--speculate", "auto", "--max-tokens", "12")["speculate"]
    assert told["speculate"] == "auto" and told["tally"]["tokens"] == 11 and "why" in told


def test_generate_without_the_mtp_layer_cannot_draft(run: Run) -> None:
    line = ["--prompt", "Tom", "--max-tokens", "2", "--device", "cpu", "--no-mtp"]
    assert "speculate: 2 drafts a step come from the MTP layer" in run("generate", *line, "--speculate", "2").err
    auto = run("generate", *line, "--speculate", "auto")
    assert auto.code == 0 and 'speculate: "auto" is 0' in auto.err
    assert "expected 0 to 5 drafts a step" in run("generate", *line, "--speculate", "6").err


def test_generate_takes_fp8_caches(run: Run) -> None:
    assert generated(run, "--index-cache", "fp8")["token_ids"] == generated(run)["token_ids"]  # all in sight
    assert len(generated(run, "--latent-cache", "fp8")["token_ids"]) == len(generated(run)["token_ids"])


def test_generate_ends_before_a_stop_string(run: Run) -> None:
    text = generated(run)["text"]
    data = generated(run, "--stop", "never", "--stop", text[3:5])
    assert (data["text"], data["finish_reason"]) == (text[:3], "stop")


def test_generate_ends_at_the_end_token_unless_told_not_to(run: Run, tmp_path: Path) -> None:
    tokens = generated(run)["token_ids"]
    assert tokens[0] != tokens[2] != tokens[1]
    root = shutil.copytree(bundled_path(), tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((root / name).read_text()) | {"eos_token_id": [tokens[2]]}
        (root / name).write_text(json.dumps(values))
    ended = generated(run, root)
    assert (ended["token_ids"], ended["finish_reason"]) == (tokens[:3], "stop")
    assert generated(run, root, "--ignore-eos")["token_ids"] == tokens


def test_a_note_on_side_files_is_told_once_on_stderr(run: Run, tmp_path: Path) -> None:
    root = shutil.copytree(bundled_path(), tmp_path / "m")
    (root / "generation_config.json").write_text(json.dumps({"top_k": -1, "eos_token_id": [257, 5]}))
    ran = run("generate", root, "--prompt", "Look", "--max-tokens", "1", "--json", "--threads", "1")
    assert ran.code == 0 and json.loads(ran.out)["token_ids"]
    assert [line for line in ran.err.splitlines() if line.startswith("note: ")] == [
        "note: generation_config.json: top_k=-1 is taken as 0: no limit",
        "note: the files name different end tokens (config.json 257; generation_config.json 257, 5): an answer ends at any of them",
    ]
    refused = run("generate", root, "--prompt", "Look", "--threads", "0")
    assert refused.code == 2 and refused.err.startswith("saccade: threads: expected an integer of at least 1")


def test_generate_runs_in_either_dtype(run: Run) -> None:
    plain, exact = (
        json.loads(run("score", "--tokens", "1,2,3", "--json", "--dtype", d).out) for d in ("auto", "float32")
    )
    assert plain["logprobs"] != exact["logprobs"]
    assert plain["logprobs"] == pytest.approx(exact["logprobs"], abs=0.3)
    assert len(generated(run, "--dtype", "float32")["token_ids"]) == 6


def test_score_prints_each_token_and_the_sum(run: Run) -> None:
    data = json.loads(run("score", "--tokens", "72,105,33", "--json").out)
    assert data["token_ids"] == [72, 105, 33] and len(data["logprobs"]) == 2
    assert data["sum"] == pytest.approx(sum(data["logprobs"]))
    lines = run("score", "--tokens", "72, 105,33").out.splitlines()
    assert [line.split()[0] for line in lines] == ["105", "33", "sum"]
    assert [float(line.split()[1]) for line in lines] == pytest.approx([*data["logprobs"], data["sum"]], abs=1e-6)


REFUSED = {
    "a prompt longer than the context": (["generate", "--prompt", "x" * 5000], "4096"),
    "a cache too small for one request": (["generate", "--prompt", "x" * 200, "--cache-tokens", "64"], "cache"),
    "a cache of nothing": (["generate", "--prompt", "x", "--cache-tokens", "0"], "cache_tokens"),
    "a token outside the vocabulary": (["score", "--tokens", "1,1152"], "1152"),
    "a negative token": (["score", "--tokens=-1,2"], "-1"),
    "tokens that are no numbers": (["score", "--tokens", "1,b"], "1,b"),
    "no token": (["score", "--tokens", ""], "--tokens"),
    "a negative temperature": (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
    "no tokens wanted": (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    "an empty stop string": (["generate", "--prompt", "x", "--stop", ""], "stop"),
    "an unknown device": (["generate", "--prompt", "x", "--device", "tpu"], "tpu"),
    "an unknown dtype": (["generate", "--prompt", "x", "--dtype", "int4"], "int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_served_is_one_clear_error(run: Run, case: str) -> None:
    line, message = REFUSED[case]
    ran = run(*line)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("saccade: ") and message in ran.err


def test_eval_reports_answers_drafts_and_arrangements(run: Run) -> None:
    line = ("eval", "--problems", "2", "--tokens", "256", "--probed", "1", "--task", "recall", "--device", "cpu")
    ran = run(*line)
    assert ran.code == 0 and "recall        256         2  100.0% +- 21.7%" in ran.out
    for part in ("recall, found values", "separate, FP8 wk and activations", "layers.4.self_attn.indexer.wk.weight"):
        assert part in ran.out
    data = json.loads(run(*line, "--json").out)
    assert data["matches"] == [
        {"task": "recall", "length": 256, "problems": 2, "exact": 2, "share": 1.0, "standard_error": 0.1875**0.5 / 2}
    ]
    fp32, fused, tensor_cores, separate, *fp8 = data["arrangements"]
    assert max(fp32["missed_mass"] + fused["missed_mass"]) < 1e-5
    assert max(tensor_cores["missed_mass"]) < max(separate["missed_mass"]) < min(max(a["missed_mass"]) for a in fp8)
    assert len(data["upcasts"]) == 5 and all(u["rounding"] == 0 and u["is_power_of_two"] for u in data["upcasts"])


def test_eval_with_an_fp8_cache_runs_it_and_says_so(run: Run) -> None:
    line = ("eval", "--problems", "1", "--tokens", "128", "--task", "recall", "--device", "cpu", "--json")
    plain, fp8 = (json.loads(run(*line, *more).out) for more in ((), ("--index-cache", "fp8")))
    assert (plain["index_cache"], fp8["index_cache"]) == ("bf16", "fp8")
    assert fp8["command"] == plain["command"].replace(" --task", " --index-cache fp8 --task")
    *same, cached = fp8["arrangements"]
    assert same == plain["arrangements"] and cached == same[4] | {"name": "fused BF16, the FP8 index cache"}


def test_eval_with_fp8_latents_runs_them_and_says_so(run: Run) -> None:
    line = ("eval", "--problems", "1", "--tokens", "128", "--task", "recall", "--device", "cpu")
    shown = run(*line, "--latent-cache", "fp8")
    assert "index keys bf16, latents fp8" in shown.out and " --latent-cache fp8 --task recall" in shown.out
    data = json.loads(run(*line, "--latent-cache", "fp8", "--json").out)
    cached = data["arrangements"][-1]
    assert data["latent_cache"] == "fp8" and cached["name"] == "fused BF16, the FP8 latent cache"
    assert len(data["arrangements"]) == 7 and 0 < cached["log_prob_mean"] <= cached["log_prob_largest"] < 1


@pytest.mark.parametrize(
    "line, message",
    [
        (["--problems", "0"], "problems: expected at least 1"),
        (["--problems", "2", "--probed", "3"], "probed: expected 0 to 2"),
        (["--tokens", "9999"], "4096"),
        (["--tokens", "64"], "128"),
        (["--task", "chess"], "words, recall, story"),
    ],
)
def test_an_eval_that_cannot_be_done_is_one_clear_error(run: Run, line: list[str], message: str) -> None:
    ran = run("eval", *line)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("saccade: ") and message in ran.err


def test_a_prompt_that_is_no_unicode_is_one_clear_error(run: Run) -> None:
    ran = run("generate", "--prompt", "\udcff", "--device", "cpu")  # what a shell's $'\xff' becomes
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("saccade: the prompt cannot be encoded") and len(ran.err.splitlines()) == 1


def test_what_generation_config_asks_for_in_vain_is_said_on_stderr(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "noted"
    shutil.copytree(bundled_path(), root)
    (root / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')
    ran = run("score", root, "--tokens", "1,2", "--device", "cpu")
    assert ran.code == 0
    assert ran.err == "note: generation_config.json: not supported and ignored: no_repeat_ngram_size=3\n"


@pytest.mark.parametrize("command", ["plan", "check"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_full_disk_is_one_clear_error(model: Path, broken: Path, command: str, is_whole: bool) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with python("-m", "saccade", command, model if is_whole else broken, stdout=full) as process:
        os.close(full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1] == "saccade: standard output cannot be written: No space left on device"
    assert "Traceback" not in err and "Exception ignored" not in err


def test_a_closed_stdout_is_one_clear_error_and_a_closed_stderr_is_silent(model: Path, tmp_path: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        words = ["sh", "-c", line, sys.executable, "-m", "saccade", "check"]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    ran = shell(f'"$0" "$@" {model} >&-')
    assert (ran.returncode, ran.stderr) == (2, "saccade: standard output is closed\n")
    ran = shell(f'"$0" "$@" {tmp_path / "nowhere"} 2>&-')
    assert (ran.returncode, ran.stdout) == (2, "")


def test_a_letter_that_the_terminal_cannot_show_is_replaced(model: Path) -> None:
    beside = model.parent / "modèle"
    beside.symlink_to(model)
    with python("-m", "saccade", "check", beside, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "mod?le: complete" in out


def python(*args: str | Path, stdout: int = subprocess.PIPE, **more: str) -> "subprocess.Popen[str]":
    line = [sys.executable, *map(str, args)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | more  # as users have it
    return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


def test_headers_are_answered_without_torch(model: Path) -> None:
    program = f"""
import sys
from saccade.checkpoint.open import bundled_path, open_model
from saccade.plan.show import show_bytes
from saccade.cli.app import app
for line in (["check", {str(model)!r}], ["plan", {str(model)!r}], ["explain", {str(model)!r}, {FUSED!r}]):
    try:
        app(line)
    except SystemExit as end:
        assert not end.code, end.code
assert "torch" not in sys.modules and "rich" not in sys.modules and "transformers" not in sys.modules
"""
    with python("-c", program) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "wk_weights_proj" in out


def test_python_m_saccade_is_the_command(model: Path) -> None:
    with python("-m", "saccade", "check", model) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "complete" in out


@pytest.mark.parametrize("command", ["plan", "check"])
def test_a_reader_that_goes_away_is_no_error(model: Path, command: str) -> None:
    """Whether the output is larger than a buffer, so that printing fails, or one line, so that the last flush does."""
    read, write = os.pipe()
    os.close(read)
    with python("-m", "saccade", command, model, stdout=write) as process:
        os.close(write)
        assert process.stderr is not None and process.stderr.read() == ""
    assert process.returncode == 141


def test_ctrl_c_ends_in_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saccade.cli.app.open_model", interrupt)
    for command in ("check", "plan"):
        assert run(command, model) == Ran(130, "", "saccade: interrupted\n")
