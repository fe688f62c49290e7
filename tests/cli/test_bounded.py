"""What a checkpoint says never floods or steers a terminal: lists are folded and cut with a count, escape sequences are
spelled out, and with --json a refusal is JSON too."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from commands import Run
from header_bytes import pack
from published_configs import deepseek_v32_config

from saccade.checkpoint.index import build_index
from saccade.checkpoint.open import bundled_path
from saccade.checkpoint.starts import Header
from saccade.cli.terminal import show_answer
from saccade.models.dsa.config import ModelConfig
from saccade.plan import make_plan, prove
from saccade.plan.diff import Side, diff, show_diff
from saccade.plan.fold import fold
from saccade.plan.problems import CHECK_LINES, show_causes
from saccade.plan.show import show_plan

MANY = 10_000
EVIL = "evil\x1b[31m\u202e\x9b2J"


def names_of(kind: str) -> list[str]:
    dice = Random(7)
    name = {
        "numbers": lambda i: f"t{i}",
        "scattered numbers": lambda i: f"t{dice.randrange(10**12)}",
        "pairs of numbers": lambda i: f"t{dice.randrange(1000)}_{dice.randrange(1000)}",
        "letters": lambda i: "".join(dice.choices("abcdefghijkl", k=12)),
    }[kind]
    return list(dict.fromkeys(name(i) for i in range(MANY)))


@pytest.mark.parametrize("kind", ["numbers", "scattered numbers", "pairs of numbers", "letters"])
def test_many_unexpected_tensors_are_folded_and_cut_with_a_count(kind: str) -> None:
    names = names_of(kind)
    raw = pack({n: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in names})
    config = ModelConfig.from_dict(deepseek_v32_config() | {"n_routed_experts": 16})
    index = build_index("x", None, [Header("m.safetensors", len(raw), raw)])
    plan = make_plan(config, index)
    problems = prove(plan)
    text = show_causes(problems, index, CHECK_LINES)
    assert len(text) < 200 * CHECK_LINES * 2 and max(map(len, text.splitlines())) < 1000
    lines = text.splitlines()
    if kind == "numbers":
        assert len(lines) < 60 and f"unused: t{{0-{MANY - 1}}} ({MANY:,} of them)" in text
    if len(lines) > CHECK_LINES:
        counts = [int(line.split(" of them)")[0].rsplit("(", 1)[1].replace(",", "")) if " of them)" in line else 1 for line in lines[:-1]]  # fmt: skip
        assert lines[-1] == f"and {len(problems) - sum(counts):,} more"
    none = build_index("y", None, [Header("m.safetensors", 10, pack({}))])
    a, b = Side(plan, {}, 0), Side(make_plan(config, none), {}, 0)
    text = show_diff(a, b, diff(a, b))
    assert len(text.splitlines()) < 130 and len(text) < 60_000
    assert kind == "numbers" or "more" in text
    assert len(show_plan(plan)) < 30_000


def test_a_list_of_few_kinds_keeps_the_numbers_in_its_words() -> None:
    assert fold(["x.weight_scale_2", "x.weight_scale_3"]) == ["x.weight_scale_2", "x.weight_scale_3"]
    many = [f"kind_{chr(97 + i)}_{j}" for i in range(21) for j in range(3)]
    assert fold(many)[0] == "kind_a_{0-2}" and len(fold(many)) == 21


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose directory, config and side files hold escape sequences."""
    root = tmp_path_factory.mktemp("m") / (EVIL + "\nsaccade: all is well")
    shutil.copytree(bundled_path(), root)
    for file, change in {
        "config.json": {"new\x1b[2J": "x", "new_number": 3, "_name_or_path": "\udce9" + EVIL},
        "generation_config.json": {"do_sample": EVIL, "top_k": EVIL, "eos_token_id": EVIL},
        "tokenizer_config.json": {"add_bos_token": True, "bos_token": EVIL},
    }.items():
        path = root / file
        values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | change))
    return root


COMMANDS: dict[str, list[str]] = {
    "check": ["check", "MODEL"], "check --contents": ["check", "MODEL", "--contents"], "check --json": ["check", "MODEL", "--json"],
    "check nothing": ["check", EVIL], "check an id": ["check", f"org/{EVIL}"], "check --sha256": ["check", "MODEL", "--sha256", EVIL],
    "check --dtype": ["plan", "MODEL", "--dtype", EVIL], "plan": ["plan", "MODEL"], "plan --full": ["plan", "MODEL", "--full"],
    "plan --diff": ["plan", "MODEL", "--diff", EVIL], "plan --diff itself": ["plan", "MODEL", "--diff", "BUNDLED"],
    "explain": ["explain", "MODEL", EVIL], "explain a parameter": ["explain", "MODEL", "model.norm"], "explain three": ["explain", EVIL, EVIL, EVIL],
    "generate": ["generate", "MODEL", "--prompt", "x", "--max-tokens", "1", "--stop", EVIL], "generate nothing": ["generate", EVIL, "--prompt", "x"],
    "generate --device": ["generate", "--prompt", "x", "--device", EVIL], "score": ["score", "MODEL", "--tokens", "1,2"],
    "score --tokens": ["score", "--tokens", EVIL], "eval --task": ["eval", "--task", EVIL], "convert": ["convert", "MODEL", "OUT", "--upcast", "indexer.wk"],
    "convert --upcast": ["convert", "MODEL", "OUT", "--upcast", EVIL], "convert nothing": ["convert", EVIL, "OUT", "--bf16"],
    "a command": [EVIL], "an option": ["check", f"--{EVIL}"], "a number": ["check", "--tp", EVIL],
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_no_command_lets_an_escape_sequence_through(run: Run, case: str, evil: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(evil), "OUT": str(tmp_path / EVIL), "BUNDLED": str(bundled_path())}
    code, out, err = run(*(places.get(word, word) for word in COMMANDS[case]))
    printed = "".join((out + err).split("\n")).replace("\t", "")
    assert printed.isprintable(), ascii(printed)
    assert code in (0, 1, 2) and "Traceback" not in err
    if "MODEL" in COMMANDS[case] and code == 0 and case not in ("generate", "score"):
        assert "new_number=3" in out + err  # what is not known is said by every command
    assert case in ("convert", "convert --upcast") or "\nsaccade: all is well" not in out + err


def test_an_answer_is_escaped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    show_answer(EVIL)
    assert capsys.readouterr().out == EVIL
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show_answer(EVIL + "\n")
    assert capsys.readouterr().out == r"evil\x1b[31m\u202e\x9b2J" + "\n"


REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["check", "nowhere-at-all"], "no such directory"), "no layout": (["plan", "--tp", "3"], "tp"),
    "no number": (["check", "--tp", "x"], "--tp"), "an empty name": (["check", ""], "empty name"), "a bad option": (["check", "--contnts"], "contnts"),
    "no other": (["plan", "--diff", "nowhere-at-all"], "no such directory"), "no prompt": (["generate"], "prompt"),
    "no tokens": (["score", "--tokens", "x"], "--tokens"), "no mode": (["convert", "BUNDLED", "OUT"], "--upcast"), "no task": (["eval", "--task", "x"], "x"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_with_json_a_refusal_is_one_json_object(run: Run, case: str, tmp_path: Path) -> None:
    words, named = REFUSED[case]
    places = {"OUT": str(tmp_path / "out"), "BUNDLED": str(bundled_path())}
    code, out, err = run(*(places.get(word, word) for word in words), "--json")
    found = json.loads(out)
    assert found["exit_code"] == code == 2 and named in found["error"]["message"] and found["error"]["kind"]
    assert named in err  # people still read it there
    assert run(*(places.get(word, word) for word in words)).out == ""
