"""A job of several ranks in which one rank comes to harm, and what is left of the job afterwards."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FAULTS = Path(__file__).parent / "rank_faults"
HARM = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Harmed(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float  # from the harm to the end of rank 0
    left: list[int]  # processes of the job that are still there
    shared: set[str]  # files that it left in /dev/shm
    came_in: bool  # the harm was done while the job ran


def run_harmed(rank: int, kind: str, moment: float, tp: int = 2, *options: str, hang: float | None = None) -> Harmed:
    """Generate with `tp` ranks, and do harm to one of them so many seconds after the start: "kill" or "stop" by a
    signal, "raise", "memory" or "loop" in a layer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if kind not in HARM:
        paths = [str(FAULTS), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "FAULT": f"{rank} {kind} {moment}"}
    command = [
        sys.executable, "-m", "saccade", "generate", "--tp", str(tp), "--prompt", "Tom has 12 apples.", "--max-tokens",
        "3000", "--ignore-eos", "--dtype", "float32", *options,
    ]  # fmt: skip
    before = set(os.listdir("/dev/shm"))
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    start = time.monotonic()
    ranks: list[int] = []
    while len(ranks) < tp - 1 and time.monotonic() - start < 60 and job.poll() is None:
        ranks = find_children(job.pid)
        time.sleep(0.05)
    time.sleep(moment)
    came_in, harmed = job.poll() is None, time.monotonic()
    if kind in HARM and came_in:
        os.kill(ranks[rank - 1] if rank else job.pid, HARM[kind])
    try:
        out, err = job.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        job.kill()
        out, err = job.communicate()
        err += "\nthe job did not end within 60 s"
    seconds = time.monotonic() - harmed
    until = time.monotonic() + 3
    while time.monotonic() < until and any(map(is_there, ranks)):
        time.sleep(0.05)
    left = [pid for pid in ranks if is_there(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shared = set(os.listdir("/dev/shm")) - before
    return Harmed(job.returncode, out, err, seconds, left, shared, came_in)


def find_children(parent: int) -> list[int]:
    """Its ranks, in the order in which they were started. By the parent that each process names: the lists of a process's
    threads lose a child for a moment where the thread that started it ends."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that has ended meanwhile
            of = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and "saccade.api.loading.rank" in (process / "cmdline").read_text():
                found.append(int(process.name))
    return sorted(found)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
