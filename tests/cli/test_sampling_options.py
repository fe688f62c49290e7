"""Options that choose tokens: each reaches its field, and a schema shapes what the bundled model says."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from commands import Run

from saccade.cli import sampling
from saccade.engine.params import SamplingParams

ASKED = {
    "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
    "presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.25, "seed": 3, "stop": ("a", "b"),
    "stop_token_ids": (1, 2), "ignore_eos": True, "regex": "[a-z]+",
}  # fmt: skip


def test_each_option_reaches_its_field(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[SamplingParams]()

    def refuse(given: dict[str, object]) -> SamplingParams:
        made.append(make(given))
        raise KeyboardInterrupt

    make = sampling.make_params
    monkeypatch.setattr(sampling, "make_params", refuse)
    words = ["generate", "--prompt", "x"]
    for name, value in ASKED.items():
        option = f"--{name.replace('_', '-')}"
        if name == "ignore_eos":
            words.append(option)
        elif name == "stop_token_ids":
            words += [option, "1,2"]
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option, str(one)]
    run(*words)
    assert made == [SamplingParams(**ASKED)]  # type: ignore[arg-type]
    assert set(ASKED) | {"json_schema", "grammar"} == set(sampling.OPTIONS) <= {f.name for f in fields(SamplingParams)}


def test_the_bundled_model_answers_as_a_schema_says(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"apples": {"type": "integer", "maximum": 99, "minimum": 10}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema | {"required": ["apples"]}))
    asked = ("generate", "--prompt", "Tom has 12 apples. He buys 7 more. How many apples does Tom have?", "--json")
    texts = []
    for drafts in ("0", "3"):
        ran = run(*asked, "--json-schema", str(tmp_path / "schema.json"), "--speculate", drafts, "--max-tokens", "120")
        assert ran.code == 0, ran.err
        told = json.loads(ran.out)
        assert 10 <= json.loads(told["text"])["apples"] <= 99 and told["finish_reason"] == "stop"
        texts.append(told["text"])
    assert texts[0] == texts[1]


def test_files_that_cannot_be_read_and_schemas_that_are_none_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for option, path, text in (
        ("--json-schema", tmp_path / "none.json", "--json-schema: "),
        ("--json-schema", tmp_path / "broken.json", "json_schema: expected a JSON schema"),
        ("--grammar", tmp_path / "none.ebnf", "--grammar: "),
    ):
        ran = run("generate", "--prompt", "x", option, str(path))
        assert ran.code == 2 and ran.err.startswith(f"saccade: {text}") and ran.err.count("\n") == 1
