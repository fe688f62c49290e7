"""`saccade compare`: nothing is found where both sides are the same; each fault is found, named, and placed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Run
from flash_models import write_flash
from openai_server import OtherEngine, answering
from served_model import serving
from whole_copies import write_copy

from saccade.api.llm import LLM
from saccade.checkpoint.open import bundled_path
from saccade.compare.answers import ComparedPrompt
from saccade.compare.compare import Comparer
from saccade.compare.local import LocalAnswers
from saccade.compare.recorded import RecordedAnswers
from saccade.compare.report import ComparisonReport
from saccade.compare.scoring import force
from saccade.compare.server import ServerAnswers
from saccade.compare.tokens import AnswerTokens
from saccade.compare.variants.table import AS_STORED, list_hypotheses
from saccade.eval.tasks import draw_test
from saccade.models.dsa.transformer import Transformer

LONG = ComparedPrompt("long", text=draw_test("recall", 0, 112).prompt)  # 94 tokens, where index_topk is 16
OPEN = ComparedPrompt("open", text=draw_test("recall", 1, 192).prompt[:700])
QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
CHAT = ComparedPrompt("chat", messages=[{"role": "user", "content": QUESTION}])
LOST = "model.layers.2.self_attn.indexer.wk.weight_scale_inv"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", mtp=False)


def ask(llm: LLM, engine: OtherEngine, *prompts: ComparedPrompt) -> ComparisonReport:
    with answering(engine) as url:
        return Comparer(llm).compare(
            ServerAnswers(url + "/v1", AnswerTokens(llm.tokenizer, llm.config.vocab_size)), prompts, 24
        )


@pytest.mark.parametrize("shape", ["ids", "texts"])
def test_the_same_checkpoint_has_no_finding(llm: LLM, shape: str) -> None:
    report = ask(llm, OtherEngine(LLM(mtp=False), shape), LONG, CHAT)
    assert (report.findings, report.rounding, report.fits) == ([], "bf16", [])
    assert [text.compared for text in report.texts] == ([108, 12] if shape == "ids" else [15, 12])
    assert [text.departure for text in report.texts] == [None, None] and report.spread.largest < report.bars[0].token
    assert any("echo" in note for note in report.notes)


def test_an_engine_that_loses_the_scales_of_one_wk(llm: LLM, tmp_path: Path) -> None:
    path = write_copy(tmp_path, lambda name, tensor: torch.ones_like(tensor) if name == LOST else tensor)
    report = ask(llm, OtherEngine(LLM(path, mtp=False), "ids"), LONG)
    (finding,), (text,) = report.findings, report.texts
    assert (finding.kind, finding.name, finding.prompt) == ("fault", "wk-scales-2", "long")
    assert "model.layers.2.self_attn.indexer.wk" in finding.text
    departure = text.departure
    assert departure is not None and finding.place == departure.place >= llm.config.index_topk
    assert abs(departure.theirs - departure.checkpoint) > 4 * abs(departure.theirs - (departure.explained or 0))
    kept = [look.kept for look in departure.looks]
    assert kept[:2] == [16, 16] and (kept[2] or 0) < 16  # the layers before see the same
    assert all(len(look.selected) == 16 for look in departure.looks)


def test_an_engine_with_another_layout_of_rope(llm: LLM, tmp_path: Path) -> None:
    path = write_copy(tmp_path, lambda _, tensor: tensor, indexer_rope_interleave=True)
    report = Comparer(llm).compare(LocalAnswers(LLM(path, dtype="float32", mtp=False)), [LONG], 16)
    assert [(f.kind, f.name) for f in report.findings] == [("fault", "index-rope-layout")]
    assert report.fits[0].left.largest < 1e-4 < report.fits[1].left.mean


def test_an_explanation_is_what_a_checkpoint_with_the_fault_says(llm: LLM, tmp_path: Path) -> None:
    """No shared experts: as if their last matrices were zeros."""
    path = write_copy(tmp_path, lambda name, t: torch.zeros_like(t) if "shared_experts.down_proj.weight" in name else t)
    tokens = LONG.read(llm)[:60]
    assert isinstance(llm.model, Transformer)
    (variant,) = (v for v in list_hypotheses(llm.model, {}) if v.name == "shared-experts")
    found, exact = (force(llm.model, v, tokens, "cpu").logprobs for v in (variant, AS_STORED))
    expected = torch.tensor(LLM(path, dtype="float32", mtp=False).score(tokens))
    assert (found - expected).abs().max() < 1e-4 < 0.1 < (exact - expected).abs().max()


def test_a_server_with_fp8_index_keys_in_a_process_of_its_own(llm: LLM, run: Run, tmp_path: Path) -> None:
    prompts, record = tmp_path / "prompts", tmp_path / "record"
    prompts.write_text(json.dumps({"id": OPEN.name, "prompt": OPEN.text}))
    with serving("--index-cache", "fp8", "--cache-tokens", "4096", "--no-mtp", "--speculate", "0") as served:
        ran = run("compare", "--server", served.url, "--prompts", prompts, "--record", record, "--json")
    report = json.loads(ran.out)
    assert ran.code == 1 and [(f["kind"], f["name"]) for f in report["findings"]] == [("format", "fp8-index-keys")]
    again = run("compare", "--replay", record)  # without the server
    assert again.code == 1 and "format, fp8-index-keys: the other side caches index keys in FP8" in again.out
    assert f"starts at token {report['findings'][0]['place']} of {report['findings'][0]['prompt']}" in again.out
    lines = record.read_text().splitlines()
    for broken, text in (
        (lines[1:], 'line 1: expected {"saccade_compare": 1'),
        ([lines[0], lines[1][:40]], "line 2 is no JSON object"),
        ([lines[0], lines[1], lines[1]], "line 3: a prompt named 'open' is there already"),
        ([lines[0], lines[1].replace('"tokens": [', '"tokens": ["x", ')], "answer: tokens: expected a list of token ids"),
        ([lines[0], lines[1].replace('"tokens": [', '"tokens": [99999, ')], "expected a log-probability for each token"),
        (lines[:1], "holds no answer"),
    ):  # fmt: skip
        record.write_text("\n".join(broken))
        ran = run("compare", "--replay", record)
        assert (ran.code, ran.out) == (2, "") and text in ran.err, ran


@pytest.mark.parametrize("shape", ["ids", "texts"])
def test_a_template_that_lacks_a_token(llm: LLM, shape: str, tmp_path: Path) -> None:
    """Found in what the server tells of its prompt; or, where that is a count, by log-probabilities."""
    path = write_copy(tmp_path, lambda _, tensor: tensor)
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(template.replace("'<|begin|>' + ", ""))
    report = ask(llm, OtherEngine(LLM(path, mtp=False), shape), CHAT)
    (finding,), (reading,) = report.findings, report.readings
    assert (finding.kind, finding.place, finding.prompt) == ("template", 0, "chat")
    assert (reading.ours, reading.theirs) == (21, 20) and reading.is_inferred == (shape == "texts")
    assert "<|begin|>" in (reading.our_token or "") and "Tom" in (reading.their_token or "")
    assert report.rounding == "bf16"  # read as the server reads it, the engine is right


def test_a_tokenizer_that_reads_text_otherwise(llm: LLM) -> None:
    engine = OtherEngine(LLM(mtp=False), "ids")
    read = engine.read
    engine.read = lambda body: read(body)[1:] if isinstance(body.get("prompt"), str) else read(body)  # type: ignore[method-assign]
    report = ask(llm, engine, ComparedPrompt("question", text=QUESTION))
    assert [(f.kind, f.place) for f in report.findings] == [("tokenizer", 0)] and report.rounding == "bf16"


def test_numbers_that_no_fault_explains(llm: LLM) -> None:
    engine = OtherEngine(LLM(mtp=False), "ids")
    reply = engine.reply

    def drift(path: str, body: object) -> tuple[int, object]:
        status, value = reply(path, body)
        if path == "/v1/completions":
            told = value["choices"][0]["logprobs"]["token_logprobs"]
            told[60:] = [logprob - 1.0 for logprob in told[60:]]
        return status, value

    engine.reply = drift  # type: ignore[assignment,method-assign]
    report = ask(llm, engine, LONG)
    assert [(f.kind, f.name, f.place) for f in report.findings] == [("unknown", "unknown", 60)]


def test_another_family_is_scored_by_its_engine(tmp_path: Path) -> None:
    """Without variants: neither explanations nor selections, but a difference is a difference."""
    write_flash(tmp_path)
    flash = LLM(tmp_path, dtype="float32", mtp=False)
    prompt = ComparedPrompt("ids", token_ids=list(range(3, 60)))
    report = Comparer(flash).compare(LocalAnswers(flash), [prompt], 4)
    assert (report.findings, report.rounding, report.texts[0].compared) == ([], "bf16", 60)
    given = LocalAnswers(flash).answer(prompt, list(range(3, 60)), 4)
    wrong = RecordedAnswers("other", [prompt], {"ids": replace(given, logprobs=[p - 1 for p in given.logprobs])})
    report = Comparer(flash).compare(wrong, [prompt], 4)
    assert [(f.kind, f.place) for f in report.findings] == [("unknown", 57)] and report.fits == []


def test_what_cannot_be_compared_is_one_line(llm: LLM, run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text(json.dumps({"prompt": QUESTION}))
    for shape, text in (
        ("html", "expected JSON as OpenAI's API has it, found '<html>'"),
        ("bare", "expected log-probabilities of its tokens (logprobs), found None"),
        ("other", "is not in the checkpoint's vocabulary of 1152: another model answers"),
    ):
        with answering(OtherEngine(llm, shape)) as url:
            ran = run("compare", "--server", url, "--prompts", prompts)
        assert (ran.code, ran.out) == (2, "") and text in ran.err and "Traceback" not in ran.err, ran
    for options, text in (
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9: no answer"),
        (["--server", "ftp://x"], "--server: expected an address such as"),
        ([], "expected one of B, --server and --replay, found none"),
        (["--replay", tmp_path / "none"], "cannot be read: No such file"),
        (["--replay", prompts, "--record", prompts], "--replay has its own prompts"),
        (["--server", "http://127.0.0.1:9", "--prompts", tmp_path / "none"], "cannot be read"),
    ):
        ran = run("compare", *([bundled_path()] if options else []), *options)
        assert (ran.code, ran.out) == (2, "") and text in ran.err, ran
    for line, text in (
        ("[]", "line 1: expected a JSON object"),
        ('{"prompt": "a", "token_ids": [1]}', "line 1: expected one of prompt, messages, token_ids, found prompt and token_ids"),
        ('{"promt": "a"}', "line 1: unknown key 'promt'"),
        ('{"token_ids": [1.5]}', "line 1: token_ids: expected integers"),
        ('{"prompt": "a"}\n{"prompt": "b", "id": 1}', "line 2: id: a prompt named '1' is there already"),
        ("", "holds no line"),
    ):  # fmt: skip
        prompts.write_text(line)
        ran = run("compare", "--server", "http://127.0.0.1:9", "--prompts", prompts)
        assert (ran.code, ran.out) == (2, "") and text in ran.err, ran


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9: no answer ("),
        (["--server", "http://127.0.0.1:99999"], "--server: expected an address"),
        (["--server", "127.0.0.1:0"], "--server: expected an address"),
        (["--server", "ftp://x"], "--server: expected an address"),
        (["--server", ""], "--server: expected an address"),
        (["nowhere"], "nowhere: no such directory"),
        (["small"], "small: cannot be loaded completely"),
        (["--replay", "nowhere"], "--replay: nowhere cannot be read"),
    ],
)
def test_the_other_side_is_refused_before_weights_are_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LLM, "of", None)  # what loads
    if line == ["small"]:
        shutil.copytree(bundled_path(), "small")
        config = Path("small/config.json")
        config.write_text(config.read_text().replace('"vocab_size": 1152', '"vocab_size": 1100'))
    ran = run("compare", bundled_path(), *line)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith(f"saccade: {told}"), ran.err
