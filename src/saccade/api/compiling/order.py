"""What processes are told to compile, and whether that was compiled before.

A stamp beside Triton's kernels says which of its folders a model needs: it is named by all that decides them, and holds
only while the folders are there. Knows no torch. Next: beside.py starts processes; worker.py is one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import saccade
from saccade.base.limits import THREAD_LIMIT, count_cpus, find_free_memory
from saccade.base.values import show

LOG = logging.getLogger("saccade")
PROCESSES_VARIABLE = "SACCADE_COMPILERS"  # how many processes; 0: none
MOST_PROCESSES = 12  # by default: of 47 kernels of a first answer, 36 s together, the slowest takes 3.3
COMPILER_BYTES = 1 << 30  # of a process and the assembler that it runs
ROOMS = ("kernels", "ops", "models", "engine", "api")  # whose code decides which kernels there are, and what they are


class Order(NamedTuple):
    """For worker.py."""

    shape: Any  # a MetaShape of meta_model.py
    groups: Sequence[Sequence[Any]]  # steps, most urgent first
    open: str  # "module:function" that makes of the shape a function which runs a step
    capability: int  # ten times the GPU's
    processes: int  # that compile
    stamp: str  # the file that says so when all is compiled; "": none


def count_processes(environment: Mapping[str, str], cpus: int | None = None, free: int | None = None) -> int:
    """Processes that compile: as SACCADE_COMPILERS says, or what CPUs and memory are there for. One CPU is left to the
    process that loads. What makes no sense there is told to the log, and ignored."""
    asked = environment.get(PROCESSES_VARIABLE, "").strip()
    if asked.isdecimal() and len(asked) <= len(str(THREAD_LIMIT)) and int(asked) <= THREAD_LIMIT:
        return int(asked)
    if asked:
        expected = f"expected a number of processes, 0 to {THREAD_LIMIT}"
        LOG.warning("%s: %s, found %s; it is ignored", PROCESSES_VARIABLE, expected, show(asked))
    spare = (count_cpus() if cpus is None else cpus) - 1
    room = (find_free_memory() if free is None else free) // COMPILER_BYTES
    return max(0, min(MOST_PROCESSES, spare, room))


def hash_order(order: Order, versions: Sequence[str], environment: Mapping[str, str]) -> str:
    """Of all that decides which kernels are needed and what they are."""
    found = hashlib.sha256(repr(order[:-2]).encode())
    knobs = sorted((name, value) for name, value in environment.items() if name.startswith("TRITON_"))
    found.update(repr((*versions, knobs)).encode())
    package = Path(saccade.__file__).parent
    for file in sorted(path for room in ROOMS for path in (package / room).rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:24]


def is_compiled(stamp: Path) -> bool:
    """Whether everything that a stamp names is still there."""
    try:
        folders = json.loads(stamp.read_text())["kernels"]
        return bool(folders) and all((stamp.parent / folder).is_dir() for folder in folders)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_stamp(stamp: Path, folders: Sequence[str]) -> None:
    """All at once, or not at all."""
    with suppress(OSError):
        part = stamp.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"kernels": sorted(set(folders))}))
        part.replace(stamp)
