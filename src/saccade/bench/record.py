"""The conditions of a measurement on a device: where it ran, with which versions, from which command.

A record is flat and complete in itself, so that records of many runs can be put in one list and still be compared.
Also here: the device's own read bandwidth, the yardstick of all the others. Knows no model. Next: steps/decode.py.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade.base.json_text import to_json
from saccade.base.result_file import require_place, write_result
from saccade.base.values import is_count, show
from saccade.errors import RequestError

Record = dict[str, Any]

READ_BYTES = 4 << 30  # far beyond any cache
READS = 12


def find_device(name: str) -> torch.device:
    """ "auto" is cuda. RequestError, in one line, where there is none."""
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError:
        raise RequestError(f"device: expected cuda, cuda:1 or cpu, found {show(name)}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RequestError(
                "this benchmark needs a CUDA device, and torch finds none; --device cpu runs small shapes"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(f"device: {name} does not exist; torch finds {torch.cuda.device_count()} CUDA device(s)")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise RequestError(f"device: expected cuda, cuda:1 or cpu, found {show(name)}")
    return device


def prepare_file(option: str, path: str | None) -> None:
    """Make the folder of a file at `path`. RequestError if it cannot be written to: not after minutes of measuring."""
    if path is None:
        return
    with suppress(OSError):  # what is not there then is told below
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    require_place(option, path)


def require_counts(**values: Any) -> None:
    """RequestError for the first value that is not an integer of at least 1."""
    for name, value in values.items():
        if not is_count(value, 1):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def describe_run(device: torch.device, commit: str | None = None) -> Record:
    """Command, device, versions, commit and date."""
    is_cuda = device.type == "cuda"
    return {
        "command": " ".join(["saccade", *_arguments()]),
        "device": name_device(device),
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "saccade": saccade.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit or _ask("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _arguments() -> list[str]:
    """The command line as the `saccade` command has it, also under `python -m saccade.bench`."""
    is_module = Path(sys.argv[0]).parts[-2:] == ("bench", "__main__.py")
    return ["bench", *sys.argv[1:]] if is_module else sys.argv[1:]


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _ask(*command: str) -> str | None:
    """The first line that a program prints, or None where it is not there or refuses."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip().partition("\n")[0] or None


def time_samples(run: Callable[[], object], device: torch.device, samples: int, runs: int = 1) -> list[float]:
    """Milliseconds of one `run`, in each of so many samples of `runs` in a row."""
    taken = []
    for _ in range(samples):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(runs):
                run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / runs)
        else:
            begin = time.perf_counter()
            for _ in range(runs):
                run()
            taken.append((time.perf_counter() - begin) * 1e3 / runs)
    return taken


def measure_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second of a plain reduction over a buffer of random numbers that no cache holds."""
    if nbytes is None:
        is_cuda = device.type == "cuda"
        nbytes = min(READ_BYTES, torch.cuda.mem_get_info(device)[0] // 2) if is_cuda else 32 << 20
    buffer = torch.empty(4096, nbytes // 4096 // 4, device=device).normal_()
    reductions: tuple[Callable[[], object], ...] = (lambda: buffer.sum(1), lambda: buffer.amax(1), lambda: buffer.sum())
    medians = []
    for reduce in reductions:
        reduce()  # compiles, allocates
        medians.append(statistics.median(time_samples(reduce, device, READS if device.type == "cuda" else 3)))
    return buffer.numel() * 4 / (min(medians) * 1e-3)


def print_table(rows: Sequence[Record], columns: Sequence[tuple[str, str, str]]) -> str:
    """Records as lines of aligned columns; a column is (key, heading, format)."""
    cells = [[heading for _, heading, _ in columns]]
    for row in rows:
        cells.append(["-" if row.get(k) is None else format(row[k], spec) for k, _, spec in columns])
    wide = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    is_text = [spec == "" for _, _, spec in columns]
    return "\n".join(
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, wide, is_text, strict=True)).rstrip()
        for line in cells
    )


def show_run(table: str, one: Record, *notes: str | None) -> str:
    """What people see of a measurement: its table, then the conditions of one record: the model, `notes` of the
    command, the device and versions, the command."""
    lines = [table]
    if "shape" in one:
        lines.append(f"{one['shape']} ({'; '.join(one.get('notes', ())) or 'whole'}), synthetic weights")
    lines += [note for note in notes if note]
    if one.get("given_tokens"):
        lines.append(
            f"experts: {one['experts']}, not the router's; a step takes the first of {one['given_tokens']} tokens"
        )
    reads = f", reads {one['read_bandwidth_gb_s']:.0f} GB/s" if "read_bandwidth_gb_s" in one else ""
    versions = [f"{name} {one[name]}" for name in ("torch", "triton", "cuda") if one[name]]
    lines += [f"{one['device']}{reads}; {', '.join(versions)}", one["command"]]
    return "\n".join(lines)


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """A JSON list at `path`; whole or not at all."""
    write_result("out", str(path), to_json(list(records), indent=1) + "\n")
