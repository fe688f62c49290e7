"""Processes of this machine as /proc tells them: alive, stopped, ended, and how; processes that die with their parent.

Reads text files and calls the kernel. Knows no ranks and no torch. Next: watch.py.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
STOPPED = "Tt"  # states of /proc/PID/stat: stopped by a signal, or by a debugger


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends. If `parent` is gone already, end now."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def read_state(pid: int) -> str:
    """A letter: R runs, S sleeps, D waits for a disk, T is stopped, Z has ended; "" for no process that can be seen."""
    return (read_stat(pid) or [""])[0]


def read_start_time(pid: int) -> str:
    """When a process began, in clock ticks: tells it from a later one with its number; "" for none."""
    fields = read_stat(pid)
    return fields[19] if len(fields) > 19 else ""


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def find_machine() -> str:
    """What two processes have in common if the number of one means it to the other: the boot and the PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def describe_end(code: int) -> str:
    """How a process ended, by the return code that `subprocess` gives."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = " (the kernel does so when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{why}"
