"""Conversions killed at random points, in processes forked from one that has imported everything and runs no thread.

`python killed_conversions.py FOLDER SEED POINTS`: FOLDER holds the sources `fp8` and `plain`. A point is the n-th call that changes
the disk (a piece of a file is then half written), n drawn from all those of a whole run; SIGKILL follows at once, whatever
the other threads do. Each third point kills the rerun too. Prints a line of JSON for each point. Run by
test_convert_kills.py, which judges what is printed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import saccade.convert.stream  # noqa: F401  # and torch with it, which `convert` imports late: a second in each child
from saccade.checkpoint.open import open_model
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.place import LOCK
from saccade.convert.target import JOURNAL
from saccade.errors import SaccadeError
from saccade.plan import make_plan, prove

MODES = (("fp8", Mode("bf16")), ("fp8", Mode("upcast", ("indexer.wk",))), ("plain", Mode("fp8")))
CALLS = ("pwrite", "replace", "fsync", "unlink", "mkdir", "open", "link")


def count_calls(stop: int) -> list[str]:
    """Count the calls of this process that change the disk, and die in the `stop`-th (0: in none)."""
    seen: list[str] = []

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & os.O_CREAT:
                seen.append(name)
                if len(seen) == stop:
                    if name == "pwrite":
                        call(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watched

    for name in CALLS:
        setattr(os, name, watch(name, getattr(os, name)))
    return seen


def run(source: Path, out: Path, mode: Mode, stop: int = 0) -> tuple[bool, int]:
    """Convert in a child that dies at the `stop`-th call: whether it was killed, and how many calls it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seen = count_calls(stop)
            convert(source, out, mode, threads=2)
            os.write(writing, str(len(seen)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    counted = os.read(reading, 20)
    os.close(reading)
    if not (os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0):
        raise SystemExit(f"the conversion failed: {mode}, killed at call {stop}")
    return os.WIFSIGNALED(status), int(counted or 0)


def digest(folder: Path) -> dict[str, str]:
    """Every file by content."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_refused(folder: Path) -> bool:
    """Whether `saccade check` would say so."""
    try:
        return bool(prove(make_plan(*open_model(folder))))
    except SaccadeError:
        return True


def main(folder: Path, seed: int, points: int) -> None:
    dice = random.Random(seed)
    wanted, calls = {}, {}
    for source, mode in MODES:
        out = folder / f"whole-{seed}-{mode.name}"
        _, calls[mode] = run(folder / source, out, mode)
        wanted[mode] = digest(out)
    for point in range(points):
        source, mode = MODES[point % len(MODES)]
        out = folder / f"out-{point}"
        line: dict[str, Any] = {"mode": mode.name, "calls": calls[mode], "killed": [], "refused": [], "whole": []}
        for _ in range(2 if point % 3 == 2 else 1):
            stop = dice.randint(1, calls[mode])
            was_killed, _ = run(folder / source, out, mode, stop)
            left = {
                name: d for name, d in digest(out).items() if not name.endswith(".part") and name not in (JOURNAL, LOCK)
            }
            line["killed"].append(stop if was_killed else 0)
            line["refused"].append(is_refused(out))
            line["whole"].append(left == wanted[mode])
            if not was_killed:
                break
        if was_killed:
            run(folder / source, out, mode)
        line["same"] = digest(out) == wanted[mode]
        shutil.rmtree(out)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
