"""What a caller meets where the model's numbers are not finite: from Python, after a push, and on the command line."""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from announcements import announce
from commands import Run
from small_checkpoints import small_config, write_small
from torch import Tensor

import saccade
from saccade.api.llm import LLM
from saccade.base.json_text import to_json
from saccade.bench.record import write_records
from saccade.cli import app as cli
from saccade.cli import bench as cli_bench
from saccade.cli import convert as convert_command
from saccade.cli import run as cli_run
from saccade.engine.params import SamplingParams
from saccade.errors import NumericsError

BAD = 300  # the token whose embedding is spoiled
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPTS = [[(7 * i + 3 * p) % 290 for i in range(30)] for p in range(3)]  # longer than index_topk, 16
SPOILED = [*PROMPTS[1][:4], BAD, *PROMPTS[1][4:]]
EMBEDDING = "model.embed_tokens.weight"


def spoil(tensors: dict[str, Tensor], name: str, place: tuple[int, ...]) -> dict[str, Tensor]:
    bad = tensors[name].clone()
    bad[place] = torch.nan
    return tensors | {name: bad}


@pytest.fixture(scope="module")
def spoiled(fp8_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = spoil(fp8_tensors, EMBEDDING, (BAD, 7))
    return write_small(tmp_path_factory.mktemp("spoiled"), small_config(), tensors)


@pytest.fixture(scope="module")
def llm(spoiled: Path) -> LLM:
    return LLM(spoiled, "cpu", speculate=2)


def test_the_answers_to_other_prompts_are_not_lost(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    with pytest.raises(NumericsError) as caught:
        llm.generate([PROMPTS[0], SPOILED, PROMPTS[1], PROMPTS[2]], GREEDY)
    first, failed, *others = caught.value.completions
    assert [made.token_ids for made in (first, *others)] == [made.token_ids for made in alone]
    assert (failed.token_ids, failed.finish_reason) == ([], "error")
    assert "model.embed_tokens 1 number is NaN or infinite, the first at [300, 7]" in failed.error
    assert str(caught.value).startswith("one prompt has no answer") and "prompt 1: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_prompt_a_stream_and_scores_raise(llm: LLM) -> None:
    with pytest.raises(NumericsError, match="^there is no answer: the logits behind position 30 are not finite"):
        llm.generate(SPOILED, GREEDY)
    stream, beside = llm.stream(SPOILED, GREEDY), llm.stream(PROMPTS[0], GREEDY)
    with pytest.raises(NumericsError, match="position 30"):
        next(stream)
    assert list(stream) == []  # told once
    with pytest.raises(NumericsError, match="the log-probabilities behind position 4 are not finite"):
        llm.score(SPOILED)
    assert [t for piece in beside for t in piece.token_ids] == llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    assert all(map(math.isfinite, llm.score(PROMPTS[0])))


def test_pushed_weights_are_judged_anew(spoiled: Path, fp8_tensors: dict[str, Tensor]) -> None:
    llm = LLM(spoiled, "cpu")
    for name, place, said in (
        (EMBEDDING, (PROMPTS[0][3], 0), "model.embed_tokens"),
        ("model.layers.1.self_attn.o_proj.weight_scale_inv", (0, 1), r"model.layers.1.self_attn.o_proj.scale"),
        (None, (), None),
    ):
        tensors = fp8_tensors if name is None else spoil(fp8_tensors, name, place)
        with llm.push(announce(tensors)) as push:
            for n, t in tensors.items():
                push.feed(n, t)
            push.finish()
        if said is None:
            assert llm.generate(PROMPTS[0], GREEDY)[0].error is None
        else:
            with pytest.raises(NumericsError, match=f"of parameter {said} 1 number is NaN"):
                llm.generate(PROMPTS[0], GREEDY)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_score_is_an_error_on_the_command_line(run: Run, spoiled: Path, options: list[str]) -> None:
    ran = run("score", spoiled, "--tokens", "5,300,6,7", "--device", "cpu", *options)
    refused = json.loads(ran.out)["error"]["kind"] if options else ran.out
    assert (ran.code, refused) == (1, "NumericsError" if options else "")
    assert ran.err.count("\n") == 1 and "position 1 are not finite (NaN or infinity)" in ran.err
    assert "check --contents" in ran.err


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, "x")], math.nan: -math.inf, "n": None, "t": True}
    assert json.loads(to_json(value), parse_constant=refuse) == {
        "a": [1.5, None, [None, "x"]],
        "nan": None,
        "n": None,
        "t": True,
    }
    assert to_json([1.0], indent=1) == "[\n 1.0\n]"


NAN_RECORD = {"ms": math.nan, "nested": [{"x": math.inf}]}


def give(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class Reported:
    def to_json(self) -> dict[str, Any]:
        return NAN_RECORD


def test_every_command_prints_what_every_parser_takes(
    run: Run, fp8_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that knows --json, made to print a NaN."""
    import saccade.bench.commands
    import saccade.bench.files.check
    import saccade.bench.files.convert
    import saccade.bench.files.load
    import saccade.eval.evaluate

    monkeypatch.setattr(cli, "check_json", give(NAN_RECORD))
    monkeypatch.setattr(cli, "plan_json", give(dict(NAN_RECORD)))
    monkeypatch.setattr(cli, "diff_json", give(NAN_RECORD))
    monkeypatch.setattr(cli_run, "find_looked", give([NAN_RECORD]))
    monkeypatch.setattr(LLM, "score", give([math.nan]))
    monkeypatch.setattr(saccade.eval.evaluate, "evaluate", give(Reported()))
    monkeypatch.setattr(convert_command, "asdict", give(NAN_RECORD))
    for module, name in ((saccade.bench.files.load, "bench_load"), (saccade.bench.files.check, "bench_check")):
        monkeypatch.setattr(module, name, give(NAN_RECORD))
    monkeypatch.setattr(saccade.bench.files.convert, "bench_convert", give(NAN_RECORD))
    monkeypatch.setattr(saccade.bench.commands, "measure_command", give([NAN_RECORD]))
    lines: list[list[str | Path]] = [
        ["check", fp8_model], ["plan", fp8_model], ["plan", fp8_model, "--diff", fp8_model],
        ["generate", "--prompt", "Tom", "--max-tokens", "1", "--looked-at", "1"], ["score", "--tokens", "5,6"], ["eval"],
        ["convert", fp8_model, tmp_path / "out", "--bf16"],
        *(["bench", name] for name in ("load", "check", "convert", "decode")),
    ]  # fmt: skip
    for line in lines:
        ran = run(*line, "--json")
        assert ran.code == 0, ran
        assert "null" in ran.out and json.loads(ran.out, parse_constant=refuse)
    write_records(tmp_path / "records.json", [NAN_RECORD])
    assert json.loads((tmp_path / "records.json").read_text(), parse_constant=refuse)


# What dumps JSON itself: it writes files or digests, or says it to a process of its own; or it writes prompts, grammars and
# arguments, as a model is to read them.
WRITERS = {
    "base/json_text.py", "checkpoint/write.py", "plan/diff.py", "convert/changes.py", "convert/target.py",
    "api/compiling/order.py", "api/compiling/worker.py", "bench/steps/start.py", "bench/ranks/join.py", "parallel/link.py",
    "chat/deepseek.py", "chat/schema.py", "chat/template.py", "engine/sampling/rules.py", "server/apis/constraints.py",
}  # fmt: skip


def test_nobody_else_prints_json() -> None:
    package = Path(saccade.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json":
                found.add(str(path.relative_to(package)))
    assert found <= WRITERS
    assert cli_bench.to_json is to_json
