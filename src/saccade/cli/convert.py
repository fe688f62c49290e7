"""`saccade convert`: options to a Mode, a progress bar on a terminal, and the report as text or JSON.

Next: convert/convert.py, which does it.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saccade.base.json_text import to_json
from saccade.base.printable import escape
from saccade.base.values import show_count
from saccade.checkpoint.header import show_name
from saccade.checkpoint.open import JOURNAL
from saccade.cli.terminal import progress_bar, say
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.convert.links import Ahead
from saccade.convert.report import Report
from saccade.convert.target import AGAIN
from saccade.errors import RequestError
from saccade.plan.fold import cut_lines, fold
from saccade.plan.show import show_bytes

NAMES_SHOWN = 20
ROUNDED_SHOWN = 4  # kinds of rounded tensors that are named
LEFT_SHOWN = 20  # files that were not copied


def run_convert(
    model: str,
    out: str,
    upcast: tuple[str, ...],
    bf16: bool,
    fp8: bool,
    threads: int | None,
    as_json: bool,
    link: str | None = None,
    revision: str | None = None,
) -> str:
    """Convert, and say what was done; on stderr, beforehand, what will be."""
    mode = choose_mode(upcast, bf16, fp8)
    with contextlib.suppress(ModuleNotFoundError):  # `convert` says so, behind all that it can do without
        from saccade.convert import stream  # noqa: F401 - libraries are no memory of a conversion
    before = find_memory_use("VmRSS")
    try:
        with progress_bar("converting") as bar:
            ahead = lambda plan: say(show_ahead(plan))  # noqa: E731
            report = convert(model, out, mode, threads, bar, link, ahead, revision, say)
    except KeyboardInterrupt:  # Ctrl-C; terminal.py says it and ends with 130
        begun = (Path(out).expanduser() / JOURNAL).exists()
        raise KeyboardInterrupt(f"{escape(out)}: interrupted; {AGAIN if begun else 'nothing was written'}") from None
    peak = find_memory_use("VmHWM")
    more = None if before is None or peak is None else peak - before
    if as_json:
        return to_json(asdict(report) | {"mode": report.mode.option, "peak_bytes_beyond_start": more})
    return show_conversion(report, more)


def choose_mode(upcast: tuple[str, ...], bf16: bool, fp8: bool) -> Mode:
    """The one mode that was asked for. RequestError for none or several."""
    asked = [name for name, given in (("--upcast", upcast), ("--bf16", bf16), ("--fp8", fp8)) if given]
    if len(asked) != 1:
        found = " and ".join(asked) or "none of them"
        raise RequestError(f"convert: expected one of --upcast MODULE, --bf16 and --fp8, found {found}")
    if "" in upcast:
        raise RequestError("--upcast: expected a module's name or its end, like indexer.wk, found nothing")
    return Mode(asked[0].removeprefix("--"), upcast)


def show_ahead(plan: Ahead) -> str:
    """One line: how many files change, their bytes, and how the others get there."""
    text = f"saccade: {plan.changed:,} of {show_count(plan.files, 'file')} with tensors to change"
    text += f", {show_bytes(plan.changed_bytes)} to write"
    if plan.kept:
        text += f"; {plan.kept:,} finished before"
    return text + "".join(f"; {line}" for line in show_whole(plan.whole, plan.whole_bytes, plan.source, plan.reason))


def show_whole(whole: Mapping[str, int], nbytes: int, source: str, reason: str = "") -> list[str]:
    """How the files in which nothing changes are there, and what follows from that."""
    lines, source = [], escape(source)
    for how, count in sorted(whole.items(), reverse=True):
        size = f" ({show_bytes(nbytes)})" if len(whole) == 1 else ""
        what = f"{count:,} unchanged{size}"
        if how == "hard":
            lines.append(f"{what}: hard links, so {source} shares these bytes: change them in neither folder")
        elif how == "sym":
            lines.append(f"{what}: symbolic links into {source}, which must stay")
        else:
            lines.append(f"{what}: copied" + (f", for hard links are refused ({reason})" if reason else ""))
    return lines


def show_conversion(report: Report, more: int | None) -> str:
    """A few lines; `more`: the peak of memory beyond what the process had at the start."""
    kept = f", {report.kept_files:,} of them finished before" if report.kept_files else ""
    speed = f"{report.seconds:.1f} s with {show_count(report.threads, 'thread')}"
    lines = [f"{escape(report.out)}: complete, {report.mode.option} of {escape(report.source)}"]
    for change, count in sorted(report.changes.items(), key=lambda item: (item[0] == "copied", item[0])):
        lines.append(f"  {change:22} {show_count(count, 'tensor')}")
    before, after = report.tensors
    became = f"{show_count(before, 'tensor')} became {after:,}"
    lines.append(f"  {'files':22} {report.files:,}{kept}, {show_bytes(report.size)}; {became}")
    lines += [f"  {'':22} {line}" for line in show_whole(report.whole, report.whole_bytes, report.source)]
    if report.others or report.dropped:
        dropped = f"; left out: {', '.join(report.dropped)}" if report.dropped else ""
        lines.append(f"  {'other files':22} {len(report.others):,} copied as they are{dropped}")
    if report.left_out:
        names = ", ".join(fold(map(show_name, report.left_out[:LEFT_SHOWN])))
        others = f" and {len(report.left_out) - LEFT_SHOWN:,} more" if len(report.left_out) > LEFT_SHOWN else ""
        lines.append(f"  {'no part of the model':22} not copied: {names}{others}")
    if report.mode.name != "fp8":
        lines.append(f"  {'exactness':22} {show_roundings(report)}")
    lines += [f"  {'warning':22} {text}" for text in report.warnings]
    lines += [f"  {'note':22} {text}" for text in report.notes]
    if report.not_finite:
        names = "; ".join(cut_lines(fold(report.not_finite), NAMES_SHOWN))
        lines.append(
            f"  {'not finite':22} NaN or infinity, as in {escape(report.source)},"
            f" see `saccade check --contents`: {names}"
        )
    measured = "" if more is None else f"; in use at most {show_bytes(more)} beyond the start"
    lines.append(f"  {'memory':22} bound {show_bytes(report.memory_bound)}{measured}")
    lines.append(f"  {'time':22} {speed}")
    return "\n".join(lines)


def show_roundings(report: Report) -> str:
    if not report.roundings:
        which = "every finite number" if report.not_finite else "every number"
        return f"{which} is the same as before, bit for bit"
    largest = max(report.roundings.values())
    names = fold(report.roundings)
    shown = "; ".join(names[:ROUNDED_SHOWN]) + ("; ..." if len(names) > ROUNDED_SHOWN else "")
    count = show_count(len(report.roundings), "tensor")
    return f"{count} rounded to BF16, by {largest:.1e} of a value at most: {shown}"


def find_memory_use(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is no such file."""
    try:
        text: Any = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key + ":")), None)
