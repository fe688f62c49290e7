"""The page that shows where an answer looked: one file that needs nothing else, whose data are the selections."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams
from saccade.eval.tasks import draw_test
from saccade.look.page import make_page
from saccade.look.selected import LookedAnswer, list_selected

FACTS = draw_test("recall", 0, 192).prompt


def read_data(page: str) -> Any:
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def test_a_page_shows_what_was_captured(run: Run, tmp_path: Path) -> None:
    """Every place that a layer selected when a token was chosen, and no other."""
    out = tmp_path / "page.html"
    ran = run("look", "--prompt", FACTS, "--out", out, "--max-tokens", "12", "--dtype", "float32")
    assert ran.code == 0 and str(out) in ran.err
    look = read_data(out.read_text())["look"]
    llm = LLM(dtype="float32", mtp=False)
    tokens = llm.encode(FACTS)
    made = llm.generate([tokens], SamplingParams(temperature=0.0, max_tokens=12), capture_selection=True)[0]
    assert "".join(look["answer"]).strip() == (made.text or "").strip() and len(look["prompt"]) == len(tokens)
    assert "".join(look["prompt"]) == "<|begin|>" * (tokens[0] == 256) + FACTS
    assert made.selections is not None and len(look["selected"]) == 12
    for i, layers in enumerate(look["selected"]):
        assert [torch.tensor(places).tolist() for places in layers] == [
            [place for place in rows[len(tokens) - 1 + i].tolist() if place >= 0] for rows in made.selections
        ]
        assert all(len(places) == 16 and places[-1] < len(tokens) + i for places in layers)
    for i, text in enumerate(look["answer"]):
        if text in (" thunder", " cedar", " blue"):  # what it found far away lies where the last layer looked
            assert text in [look["prompt"][place] for place in look["selected"][i][3] if place < len(tokens)], text
    assert " cedar" in look["answer"]


def test_a_page_needs_nothing_else_and_no_text_ends_its_data() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    page = make_page(LookedAnswer([hostile, "{{program}}"], ["\u2028"], [[[0], [0, 1]]]), title=hostile)
    assert read_data(page) == {
        "title": hostile, "look": {"prompt": [hostile, "{{program}}"], "answer": ["\u2028"], "selected": [[[0], [0, 1]]]}
    }  # fmt: skip
    assert page.count("<script") == page.count("</script>") == 2 and hostile not in page
    assert not re.search(r"(src|href)=|@import|url\(", re.sub(r'href="data:,"', "", page))
    assert "default-src 'none'" in page and make_page().count("{{") == 0


def test_a_page_of_a_run_that_kept_its_selections(run: Run, tmp_path: Path) -> None:
    """`generate --selections` and `look --selections` show what `look` shows of the same prompt, of one and of many."""
    kept, page, asked = tmp_path / "kept", tmp_path / "page.html", tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": text, "max_tokens": 12}) + "\n" for text in ("Tom has", FACTS)))
    greedy = "--temperature", "0", "--dtype", "float32"
    assert run("look", "--prompt", FACTS, "--out", page, "--max-tokens", "12", "--dtype", "float32").code == 0
    wanted = read_data(page.read_text())["look"]
    assert run("generate", "--prompt", FACTS, "--max-tokens", "12", *greedy, "--selections", kept).code == 0
    assert run("look", "--selections", kept, "--out", page).code == 0
    assert read_data(page.read_text())["look"] == wanted
    out = tmp_path / "out"
    assert run("generate", "--input", asked, "--output", out, *greedy, "--selections", kept).code == 0
    ran = run("look", "--selections", kept, "--request", "1", "--out", page)
    assert ran.code == 0 and read_data(page.read_text())["look"] == wanted
    for options, text in (
        (("look", "--selections", kept, "--request", "2"), f"--request: {kept} has no request 2, it holds 0 to 1"),
        (("look", "--selections", tmp_path / "none"), "cannot be read as selections"),
        (
            ("generate", "--prompt", "a", "--selections", tmp_path / "none" / "x"),
            "--selections: expected a file to write",
        ),
        (("generate", "--input", asked, "--output", out, *greedy, "--selections", kept), "holds the answers to all"),
    ):
        ran = run(*options)
        assert text in ran.err and "Traceback" not in ran.err, ran
    out.write_text(out.read_text().splitlines()[0] + "\n")
    ran = run("generate", "--input", asked, "--output", out, *greedy, "--selections", kept)
    assert ran.code == 2 and "holds 1 answers already" in ran.err and "loaded" not in ran.err


def test_rows_of_the_prompt_are_left_out() -> None:
    rows = torch.tensor([[0, -1], [0, 1], [1, 2], [0, 3]])
    assert list_selected([rows, rows.flip(0)], 3, 2) == [[[1, 2], [0, 1]], [[0, 3], [0]]]
    assert list_selected([], 3, 0) == []


@pytest.mark.parametrize("name", ["none/page.html", "", "."])
def test_a_page_that_cannot_be_written_is_told_before_a_model_is_loaded(run: Run, tmp_path: Path, name: str) -> None:
    ran = run("look", "--prompt", "a", "--out", str(tmp_path / name) if name else name)
    assert (
        (ran.code, ran.out) == (2, "")
        and "--out: " in ran.err
        and "expected a file to write to" in ran.err
        and "loaded" not in ran.err
    )


def test_a_model_that_does_not_run_leaves_the_page_as_it_was(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.html", tmp_path / "new.html"
    old.write_text("old")
    for out in (old, new):
        ran = run("look", str(tmp_path / "no-model"), "--prompt", "a", "--out", out)
        assert (ran.code, ran.out) == (2, "")
    assert old.read_text() == "old" and not new.exists()
    ran = run("look", "--out", new)
    assert ran.code == 2 and "expected one of --prompt TEXT, --prompt-file FILE and --selections FILE" in ran.err
