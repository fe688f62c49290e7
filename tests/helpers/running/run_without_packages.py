"""Run command lines where the packages that only `saccade[run]` brings cannot be imported; JSON of how each ended.

`python run_without_packages.py '[["check"], ...]'`: an import hook stands for an environment without them.
"""

import contextlib
import io
import json
import sys

BLOCKED = {"torch", "triton", "numpy", "safetensors", "tokenizers", "transformers", "fastapi", "uvicorn"}


class Blocker:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(line: list[str]) -> tuple[int, str, str]:
    from saccade.cli.app import app

    out, err, code = io.TextIOWrapper(io.BytesIO()), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(line, prog_name="saccade")
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
    out.flush()
    return code or 0, out.buffer.getvalue().decode(), err.getvalue()  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    import saccade

    try:
        saccade.LLM  # noqa: B018
        text = "imported"
    except saccade.SaccadeError as error:
        text = f"{type(error).__name__}: {error}"
    print(json.dumps([text, *map(run, json.loads(sys.argv[1]))]))
