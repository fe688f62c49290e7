"""The benchmarks of a device, on a CPU: the indexer's arrangements, layers and pictures, command lines."""

import json
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from commands import Run

from saccade import kernels
from saccade.bench import profile, record
from saccade.bench.__main__ import main
from saccade.bench.bytes import Storage, count_layer
from saccade.bench.commands import BENCH_COMMANDS, NOT_ARGUMENTS, BenchCommand
from saccade.bench.plot import LAYER, draw_layer, list_layer
from saccade.bench.projection import arms, unfused
from saccade.bench.projection import operation as indexer
from saccade.bench.shapes import find_shape
from saccade.bench.steps.start import START_STAGES, run_once
from saccade.errors import RequestError
from saccade.kernels.reference import decode
from saccade.parallel.ranks import ONE_RANK

CPU = torch.device("cpu")
V32 = "v32-rank-of-8"


# The indexer's arrangements.


def test_the_unfused_gemm_multiplies_what_was_quantised() -> None:
    (o,) = arms.make_operands(find_shape("bundled").config, 3, 1, CPU)
    codes, scales = unfused.quantize_activations(o.x16)
    wanted = (codes[:3].float() * scales[:3].repeat_interleave(128, 1)) @ decode(o.wk).T
    for tile in unfused.TILES:
        found = unfused.multiply_quantised(codes, scales, o.wk, 3, tile).float()
        error = (found - wanted).norm() / wanted.norm()
        print(f"tile {tile}: {error:.1e}")
        assert error < 4e-3  # of rounding to BF16
    back = codes[:3].float() * scales[:3].repeat_interleave(128, 1)
    # On a GPU 2.5e-2; the interpreter cuts numbers off instead of rounding them.
    assert (back - o.x).norm() / o.x.norm() < 8e-2


def test_an_arm_computes_key_and_weights_or_says_why_not() -> None:
    operands = arms.make_operands(find_shape("bundled").config, 1, 1, CPU)
    fused = next(arm for arm in arms.ARMS if "cuBLAS" in arm.name)
    assert arms.find_error(fused, operands[0]) < 4e-3
    streams = next(arm for arm in arms.ARMS if arm.key == "c")
    assert indexer.compare_arm(streams, operands, "no base", 1) == {"failed": "two streams need a CUDA device"}
    assert {arm.key for arm in arms.ARMS} == set("abcdef")


@pytest.mark.parametrize("arm", [arm for arm in arms.ARMS if arm.key in "bdef"], ids=lambda arm: arm.name[:24])
def test_our_own_arms_compute_what_the_others_do(arm: arms.Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products in plain torch: which matrices an arm multiplies, in which order."""
    monkeypatch.setattr(arms, "multiply_parts", lambda x, *parts: torch.cat([x @ decode(part).T for part in parts], 1))
    (o,) = arms.make_operands(find_shape("bundled").config, 2, 1, CPU)
    assert arms.find_error(arm, o) < 4e-3


@pytest.mark.parametrize(("key", "megabytes"), [("a", 16.97), ("e", 17.89), ("f", 16.97)])
def test_an_arm_s_bytes_are_those_of_its_weights(key: str, megabytes: float) -> None:
    arm = next(arm for arm in arms.ARMS if arm.key == key)
    assert indexer.count_arm_bytes(find_shape(V32).config, arm) / 1e6 == pytest.approx(megabytes, abs=0.01)


# Layers and pictures.


def test_a_layer_is_found_as_what_repeats() -> None:
    head, dense, sparse, tail = ["embed"], ["a", "b", "b", "d"], ["a", "b", "b", "r", "e", "e"], ["n", "l", "m"]
    names = head + 2 * dense + 5 * sparse + tail
    assert profile.find_layer(names) == (len(head + 2 * dense), 6, 5)
    assert profile.find_layer(["a", "b", "c"]) is None
    kernels = [(name, float(i)) for i, name in enumerate(names)]
    assert profile.fold_layer(kernels)[0] == ("a", 9 + 12.0)  # the median of 9, 15, 21, 27, 33
    assert profile.fold_layer(kernels[:3]) == kernels[:3]


def test_a_layer_of_64_kernels_is_found_and_more_are_no_layer() -> None:
    """More than twice what a layer has: the search takes as many passes over a step's names as a layer may have."""
    layer = [f"kernel {i}" for i in range(64)]
    assert profile.find_layer(["embed", *layer * 3, "norm"]) == (1, 64, 3)
    assert profile.find_layer([*layer, "one more"] * 3) is None


def test_a_kernel_s_time_starts_where_the_one_before_ended() -> None:
    def spans(at: float) -> list[profile.KernelRun]:
        return [
            profile.KernelRun("a", at, at + 5),
            profile.KernelRun("b", at + 3, at + 9),
            profile.KernelRun("c", at + 11, at + 12),
        ]

    seen = [span for i in range(3) for span in reversed(spans(100.0 * i))]
    assert profile.merge_runs(seen, 3) == [("a", 5.0), ("b", 4.0), ("c", 3.0)]
    assert profile.merge_runs(seen[:-1], 3) == []  # a kernel is missing
    assert profile.time_kernels(lambda: None, CPU) == []


@pytest.mark.parametrize("context", [8192, 131072])
def test_kernels_get_their_bytes_if_they_are_those_of_the_decode_step(context: int) -> None:
    config = find_shape(V32, 8).config
    launches = [launch for launch in LAYER if launch.is_always or context > 8192]
    layer = [(launch.kernel, float(i)) for i, launch in enumerate(launches)]
    kernels = [
        ("_begin_step", 1.0),
        *layer[:-2],
        ("_gate_up", 9.0),
        ("_down_few", 9.0),
        *5 * layer,
        ("_multiply", 70.0),
    ]
    bars = list_layer(kernels, config, 1, context, 8.0)
    assert [bar[:2] for bar in bars] == [(launch.label, float(i)) for i, launch in enumerate(launches)]
    counted = count_layer(config, 7, 1, context, 8.0)
    assert sum(b for _, _, b in bars) == pytest.approx(sum(counted.values()))  # none is left out, none counted twice
    other = list_layer([("x", 1.0), ("y", 2.0)], config, 1, context, 8.0)
    assert [bar[:2] for bar in other] == [("x", 1.0), ("y", 2.0), ("bytes of the layer", 0.0)]


def test_the_launches_of_a_layer_are_kernels_that_exist() -> None:
    sources = "".join(path.read_text() for path in Path(kernels.__path__[0]).rglob("*.py"))
    assert [launch.kernel for launch in LAYER if f"def {launch.kernel}(" not in sources] == []


def test_a_drawn_layer_is_svg_with_bars_to_scale() -> None:
    text = draw_layer([("q_a <&> kv_a", 8.0, 17e6), ("select", 4.0, 0.0)], 4e12, "one layer")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width", 0)) for r in root.iter(space + "rect") if r.get("rx")]
    said = [t.text or "" for t in root.iter(space + "text")]
    assert widths[0] == 2 * widths[2] and widths[1] == pytest.approx(widths[0] * 17 / 32, abs=0.1) and widths[3] == 0
    assert "q_a <&> kv_a" in said and "8.0 µs, 17.0 MB, 53% of bandwidth" in said
    assert any("12.0 µs; its 17.0 MB take 4.2 µs" in line for line in said)


# Command lines.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["decode", "--shape", "v4"], "--shape: expected one of v32-rank-of-8"),
        (["decode", "--shape", "bundled", "--layers", "9"], "--layers: expected an integer from 1 to 4, found 9"),
        (["decode", "--arrangement", "packed"], "arrangement packed needs a CUDA device"),
        (["prefill", "--arrangement", "fast"], "--arrangement: expected one of packed"),
        (["prefill", "--activations", "int8"], '--activations: expected "auto", "exact", "bf16" or "fp8", found'),
        (["decode", "--batch", "1,x"], "--batch: expected integers of at least 1 with commas between, found '1,x'"),
        (["decode", "--batch", "0"], "--batch: expected integers of at least 1"),
        (["decode", "--shape", "bundled", "--context", "9999"], "--context: expected 21 (more than the steps) to 4096"),
        (["decode", "--shape", "bundled", "--steps", "0"], "--steps: expected an integer of at least 1"),
        (["decode", "--device", "tpu"], "--device: expected cuda, cuda:1 or cpu, found 'tpu'"),
        (["prefill", "--seed", "-1"], "--seed: expected an integer from 0 to 9,223,372,036,854,775,807, found -1"),
        (["engine", "--chunk", str(2**20 + 1)], "--chunk: expected an integer from 1 to 1,048,576, found 1048577"),
        (["chunks", "--chunk", f"64,{2**62}"], "--chunk: expected integers of 1,048,576 at most, found '64,4611"),
        (["chunks", "--chunk", "default,x"], "--chunk: expected integers of at least 1 with commas between, found 'x'"),
        (["host", "--clients", "16385"], "--clients: expected integers of 16,384 at most, found '16385'"),
        (
            ["decode", "--tp", "1025"],
            "tp and ep: expected up to 1024 ranks, and a number that divides them, found --tp 1",
        ),
        (["indexer", "--out", "/"], "--out: expected a file to write to, found a directory: /"),
        (["decode", "--plot", "/"], "--plot: expected a file to write to, found a directory: /"),
        (["start", "--compilers", "-1"], "--compilers: expected an integer from 0 to 1,024, found -1"),
        (["start", "--compilers", "100000"], "--compilers: expected an integer from 0 to 1,024, found 100000"),
        (["start", "--compilers", "2"], "--compilers: kernels are compiled beforehand for a GPU"),
        (["start", "--arrangement", "packed,fused"], "--arrangement: expected one of packed"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(
    run: Run, capsys: pytest.CaptureFixture[str], line: list[str], message: str
) -> None:
    line = line if "--device" in line else [*line, "--device", "cpu"]
    ran = run("bench", *line)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith(f"saccade: {message}") and ran.err.count("\n") == 1
    assert main(line) == 2  # without typer, the same
    assert capsys.readouterr() == ("", ran.err)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["start", "--compilers", "x"], "an integer, found 'x'"),
        (["start", "--compilers", "1.5"], "an integer, found '1.5'"),
        (["start", "--compilers", "9" * 5000], "an integer, found '99"),
        (["engine", "--load", "much"], "a number, found 'much'"),
    ],
    ids=["a word", "a fraction", "5,000 digits", "a word for a fraction"],
)
def test_what_is_no_number_is_one_clear_line(
    run: Run, capsys: pytest.CaptureFixture[str], line: list[str], expected: str
) -> None:
    """From both parsers, in their words: the option as it is typed, what was expected, what was found."""
    ran = run("bench", *line)
    with pytest.raises(SystemExit) as ended:
        main(line)
    for code, text in ((ran.code, ran.err), (ended.value.code, capsys.readouterr().err)):
        assert code == 2 and text.count("\n") == 1 and len(text) < 300
        assert line[1] in text and f"expected {expected}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("command", ["decode", "prefill", "indexer", "start"])
def test_without_a_gpu_each_command_says_so(run: Run, command: str) -> None:
    ran = run("bench", command)
    assert ran.code == 2 and ran.err.startswith("saccade: this benchmark needs a CUDA device")


@pytest.mark.parametrize("command", BENCH_COMMANDS, ids=lambda command: command.name)
def test_both_command_lines_pass_the_same_arguments(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: BenchCommand
) -> None:
    """None given, and each: arguments that the function has, defaults that are its own where it has some."""
    passed = list[dict[str, Any]]()

    def note(say: object, **arguments: Any) -> list[Any]:
        passed.append(arguments)
        return []

    taken = signature(command.fetch("bench")).parameters
    monkeypatch.setattr(BenchCommand, "fetch", lambda *_: note)
    values = {str: "3", int: "3", float: "3.5"}
    given = [
        word
        for option in command.options
        if option.name not in ("tp", "ep", "out", "device")
        for word in (option.flag, values.get(option.value_type))
        if word
    ]
    for words in (["--json"], [*given, "--json"]):
        words = words if command.name != "allreduce" else [*words, "--tp", "1"]
        assert main([command.name, *words]) == 0 and run("bench", command.name, *words).code == 0
        plain, typer = passed[-2:]
        assert plain == typer and set(plain) <= set(taken) - {"say"}
    arguments = [option for option in command.options if option.name not in NOT_ARGUMENTS]
    assert len(passed[-1]) == len(arguments) + command.has_ranks  # no two options are one argument
    for name, value in passed[0].items():
        own = taken[name].default
        assert own in (Parameter.empty, ONE_RANK) or own == (tuple(value) if isinstance(value, list) else value), name


def test_records_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "x.json"
    line = ["decode", "--shape", "bundled", "--device", "cpu", "--context", "64", "--steps", "1", "--repeats", "1"]
    assert main([*line, "--random-cache", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (written,) = json.loads(out.read_text())
    assert "ms a token" in printed and written["cache"] == "random normal rows" and written["context"] == 64
    assert [file.name for file in out.parent.iterdir()] == ["x.json"]
    drawn = tmp_path / "layer.svg"
    assert main([*line, "--json", "--plot", str(drawn)]) == 0
    assert not drawn.exists()  # no kernels were seen
    assert json.loads(capsys.readouterr().out)[0]["shape"] == "bundled"


def test_the_module_needs_no_typer() -> None:
    program = "import sys; sys.modules['typer'] = None; import saccade.bench.__main__"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_start_is_timed_stage_by_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    wish = {"shape": "bundled", "layers": 1, "context": 20, "batch": 2, "arrangement": "reference", "device": "cpu"}
    found = run_once({**wish, "seed": 0}, str(tmp_path))
    stages = [found[f"{stage}_s"] for stage in START_STAGES]
    assert min(stages) >= 0 and found["imports_s"] > 0.1 and found["first_token_s"] > 0
    assert sum(stages) == pytest.approx(found["total_s"])
    with pytest.raises(RequestError, match="the process that was timed failed: .*shape: expected one of"):
        run_once({**wish, "seed": 0, "shape": "v4"}, str(tmp_path))


def test_tables_line_up() -> None:
    rows = [{"name": "a", "n": 1.5}, {"name": "long", "n": None}]
    assert record.print_table(rows, (("name", "what", ""), ("n", "n", ".2f"))) == "what     n\na     1.50\nlong     -"


def test_fp8_index_keys_halve_their_bytes() -> None:
    c = find_shape(V32, 6).config
    half = count_layer(c, 5, 1, 8192, storage=Storage(index_cache="fp8"))["index keys"]
    assert half / count_layer(c, 5, 1, 8192)["index keys"] == pytest.approx(132 / 256)
