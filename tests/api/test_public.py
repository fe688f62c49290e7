"""The public names: complete, typed, documented to the last field, and there without torch."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import SIZES, write

import saccade
from saccade import errors
from saccade.api.llm import LLM

ROOT = Path(saccade.__file__).parents[2]
CLASSES = sorted({name for name in saccade.__all__ if name != "__version__"})


def test_every_public_name_is_there_and_completed_by_tab() -> None:
    program = """
import sys, saccade
assert set(saccade.__all__) <= set(dir(saccade)), dir(saccade)
saccade.SamplingParams(max_tokens=3), saccade.PlanError("x").problems
assert "torch" not in sys.modules
from saccade import *
assert LLM.__module__ == "saccade.api.llm" and issubclass(RequestError, SaccadeError) and Piece and Completion
try:
    saccade.Llm
except AttributeError as error:
    assert "'Llm'" in str(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_every_error_is_public() -> None:
    raised = [name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")]
    assert set(raised) <= set(saccade.__all__)


def find_documented(cls: type) -> list[tuple[str, str]]:
    """(field or parameter, the text that should speak of it), of a dataclass or of a class's public methods."""
    text = cls.__doc__ or ""
    if dataclasses.is_dataclass(cls):
        return [(field.name, text) for field in dataclasses.fields(cls)]
    methods = {name: m for name, m in vars(cls).items() if inspect.isfunction(m) and not name.startswith("_")}
    found = [(p, text) for p in inspect.signature(cls).parameters]
    for method in methods.values():
        assert method.__doc__, method
        found += [(p, method.__doc__) for p in inspect.signature(method).parameters if p != "self"]
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_and_field_is_in_its_docstring(name: str) -> None:
    cls = getattr(saccade, name)
    assert cls.__doc__ and not cls.__doc__.startswith(f"{name}("), "what dataclass writes is no documentation"
    if not issubclass(cls, Exception):
        found = find_documented(cls)
        assert found and [p for p, text in found if f"`{p}`" not in text and f"`{p}=" not in text] == []


USER = """
from collections.abc import Iterator
from saccade import LLM, Completion, Piece, SaccadeError, SamplingParams

llm = LLM(model="path", device="cpu")
params = SamplingParams(max_tokens=3, stop=["x"], temperature=0)
outs: list[Completion] = llm.generate(["a"], sampling_params=params)
text: str | None = outs[0].text
pieces: Iterator[Piece] = llm.stream("a", params)
scores: list[float] = llm.score([1, 2])
try:
    llm.generate("a", [params])
except SaccadeError as error:
    print(str(error))
wrong: int = outs[0].text  # line 14
llm.generate("a", temperature=1)  # line 15
SamplingParams(max_tokens="3")  # line 16
"""


def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    """As from outside: by the marker in the package. torch's own types take a minute, and nothing here is theirs."""
    (tmp_path / "user.py").write_text(USER.lstrip("\n"))
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nmypy_path = " + str(ROOT / "src") + "\nfollow_imports = silent\nignore_missing_imports = True\n"
        "[mypy-torch.*,triton.*,tokenizers.*,numpy.*,safetensors.*,huggingface_hub.*,httpx.*]\nfollow_imports = skip\n"
        "[mypy-saccade.*]\nfollow_imports = skip\n"  # the whole package takes 21 s, these 5
        "[mypy-saccade,saccade.api.*,saccade.errors,saccade.engine.params,saccade.chat.types]\nfollow_imports = silent\n"
    )
    assert (Path(saccade.__file__).parent / "py.typed").exists()
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = [text.split(": error:")[0] for text in ran.stdout.splitlines() if ": error:" in text]
    assert found == ["user.py:14", "user.py:15", "user.py:16"], ran.stdout + ran.stderr


def test_both_names_of_model_and_params_are_one(tmp_path: Path) -> None:
    root = write(tmp_path / "tiny")
    llm, same = LLM(model=root, **SIZES), LLM(path=str(root), **SIZES)
    params = saccade.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    (one,), (two,) = llm.generate("abc", params), same.generate("abc", sampling_params=params)
    assert one == two and len(one.token_ids) == 3
    pieces = list(llm.stream("abc", sampling_params=params))
    assert [t for piece in pieces for t in piece.token_ids] == one.token_ids
    with pytest.raises(saccade.ConfigError, match="^model and path are one argument"):
        LLM(root, path=root)
    for call in (llm.generate, llm.stream):
        with pytest.raises(saccade.RequestError, match="^params and sampling_params are one argument"):
            call("abc", params, sampling_params=params)
    with pytest.raises(saccade.RequestError, match="expected SamplingParams, found"):
        llm.generate("abc", sampling_params={"max_tokens": 3})  # type: ignore[arg-type]
