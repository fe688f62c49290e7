"""Mutated small checkpoints: files are written, `saccade check` and the loader judge them, tests/helpers/oracles/expected_parameters.py judges both.

Each mutant is refused before a tensor byte is read, or loads to exactly what its own bytes say, and every tensor of it
is read or ignored for a reason. `python tests/helpers/fuzzing fuzz_checkpoints CASE` repeats one case.
"""

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from changed_checkpoints import mutate
from exact_load import compare
from fuzz_headers import readable
from fuzzing import Failure

from saccade.checkpoint.open import open_model
from saccade.cli.app import app
from saccade.errors import SaccadeError
from saccade.plan import make_plan, prove


@contextlib.contextmanager
def written(files: dict[str, bytes]) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for name, raw in files.items():
            (root / name).write_bytes(raw)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_check(root: Path) -> int:
    """Exit code of `saccade check`: 1 for problems, 2 for what is no model. Failure if it prints a traceback or what no
    terminal should get."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(["check", str(root)], prog_name="saccade")
        except SystemExit as end:
            code = end.code or 0
    text = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2) or "Traceback" in text or not text.replace("\n", "").isprintable() or not text.strip():
        raise Failure(f"`saccade check` ended with {code}: {text[:500]!r}")
    return int(code)


def judge(case: int) -> str:
    files, done = mutate(case)
    with written(files) as root:
        try:
            exit_code = run_check(root)
            try:
                config, index = open_model(root)
                plan = make_plan(config, index)
                problems = prove(plan)
            except SaccadeError as e:
                if exit_code != 2:
                    raise Failure(f"`saccade check` ended with {exit_code}, planning says {e}") from None
                return f"refused: {type(e).__name__}"
            if exit_code != bool(problems):
                raise Failure(f"`saccade check` ended with {exit_code}, {len(problems)} problems")
            if problems:
                return "refused: " + readable(problems)
            compare(root, plan)
            compare(root, make_plan(config, index, dtype="float32"))
        except Exception as e:
            raise Failure(f"({done}) {type(e).__name__}: {e}") from e
    return "loaded as its bytes say"


if __name__ == "__main__":
    print(mutate(int(sys.argv[1]))[1])
    print(judge(int(sys.argv[1])))
