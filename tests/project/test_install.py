"""What an installation brings: headers are read without torch, the rest says what it lacks, an sdist is whole.

`make soak` installs into environments of its own, with and without `[run]`; here an import hook stands for them.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import saccade

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FUSED = "model.layers.1.self_attn.indexer.wk_weights_proj"
IGNORED = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "soak.txt")
BUNDLED = str(Path(saccade.__file__).parent / "bundled")
# Refused from headers, whoever asks; and what is proven, so that only its bytes are left to do.
REFUSED = [
    ["convert", BUNDLED, "out", "--fp8"],
    ["convert", BUNDLED, f"{BUNDLED}/out", "--bf16"],
    ["convert", BUNDLED, "out", "--upcast", "wq"],
]
PLANNED = [["convert", BUNDLED, "out", "--bf16"], ["convert", BUNDLED, "out", "--upcast", "indexer.wk"]]
READ = [
    ["--version"], ["--help"], ["check"], ["check", "--json", "--tp", "2"], ["plan"], ["plan", "--json"], ["plan", "--full"],
    ["explain", FUSED], ["generate", "--help"], ["chat", "--help"], ["serve", "--help"], ["bench", "--help"],
]  # fmt: skip
NEED = [
    ["generate", "--prompt", "Tom"], ["chat"], ["score", "--tokens", "1,2"], ["eval"],
    ["check", "--contents"], ["bench", "load"], ["bench", "decode"], ["generate", "--input", str(TESTS / "nothing.jsonl")],
]  # fmt: skip


def test_headers_are_read_without_torch_and_the_rest_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Tom"}\n')
    diff = ["plan", "--diff", BUNDLED]
    need = [*NEED[:-1], ["generate", "--input", str(tmp_path / "in.jsonl")]]
    serve = ["serve", "--port", "0"]
    lines = [*READ, diff, *need, serve, *REFUSED, *PLANNED]
    line = [sys.executable, str(TESTS / "helpers/running/run_without_packages.py"), json.dumps(lines)]
    ran = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    missing, *ended = json.loads(ran.stdout)
    assert missing.startswith("MissingPackageError: saccade.LLM needs the package torch, which is not installed")
    for asked, (code, out, err) in zip(lines, ended, strict=True):
        if asked in need:
            assert (code, out, err.count("\n")) == (2, "", 1), (asked, err)
            assert err.startswith("saccade: this command needs the package ") and "pip install 'saccade[run]'" in err, (
                err
            )
        elif asked == serve:
            assert (code, out, err.count("\n")) == (2, "", 1) and "pip install 'saccade[serve]'" in err, err
        elif asked in REFUSED:
            assert (code, out, err.count("\n")) == (2, "", 1) and "torch" not in err, (asked, err)
        elif asked in PLANNED:
            ahead, why = err.splitlines()
            assert (code, out) == (2, "") and why.startswith("saccade: convert: to write this needs the package "), err
            size = "15.1" if "--upcast" in asked else "26.1"
            assert ahead == f"saccade: 3 of 3 files with tensors to change, {size} MB to write", ahead
        else:
            assert (code, err) == (0, "") and out, (asked, err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def copy_tree(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*IGNORED))


def build(kind: str, tree: Path, out: Path) -> Path:
    """An sdist or a wheel, by setuptools alone: nothing is fetched."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.splitlines()[-1]


def test_an_sdist_is_the_whole_tree_and_a_wheel_the_whole_package(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    expected = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()} - {".gitignore"}
    with tarfile.open(build("sdist", tree, tmp_path)) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert expected - names == set()
    with zipfile.ZipFile(build("wheel", tree, tmp_path)) as wheel:
        held = set(wheel.namelist())
    package = {str(p.relative_to(tree / "src")) for p in (tree / "src" / "saccade").rglob("*") if p.is_file()}
    assert package - held == set() and "saccade/py.typed" in held
    assert not [name for name in held if not name.startswith(("saccade/", "saccade-"))]


@pytest.mark.soak
def test_clean_environments_without_and_with_what_runs_models(tmp_path: Path) -> None:
    """Needs a package registry: twice a fresh environment, first without torch."""
    tree = copy_tree(tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}

    def call(*line: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, line)), capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1800
        )

    def install(name: str, what: str) -> Path:
        call(sys.executable, "-m", "venv", tmp_path / name)
        ran = call(tmp_path / name / "bin" / "python", "-m", "pip", "install", "--quiet", what)
        assert ran.returncode == 0, ran.stderr
        return tmp_path / name / "bin"

    bin = install("plain", str(wheel))
    assert call(bin / "python", "-c", "import torch").returncode != 0
    for line in READ:
        ran = call(bin / "saccade", *line)
        assert (ran.returncode, ran.stderr) == (0, ""), (line, ran.stderr)
    assert "no torch" in call(bin / "saccade", "--version").stdout
    for line in NEED[:-1]:
        ran = call(bin / "saccade", *line)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1) and "saccade[run]" in ran.stderr, line

    bin = install("whole", f"saccade[run] @ {wheel.as_uri()}")
    ran = call(
        bin / "saccade", "generate", "--prompt", "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
    )
    assert ran.returncode == 0 and ran.stdout.endswith("#### 19\n"), ran.stderr


@pytest.mark.soak
def test_tests_of_an_unpacked_sdist_run(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", copy_tree(tmp_path / "tree"), tmp_path)) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    files = [
        "tests/project/test_project.py",
        "tests/engine/test_params.py",
        "tests/plan/test_plan.py",
        "tests/api/test_llm.py",
    ]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"}
    line = [sys.executable, "-m", "pytest", *files]
    ran = subprocess.run(line, cwd=root, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:]
