"""The outcome of `saccade check`, for people and as JSON data. Knows Plans and findings, no tensors, no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.base.values import show_count
from saccade.checkpoint.index import Index
from saccade.errors import Problem
from saccade.inspect.findings import UPCAST_BOUND, Contents, Upcast
from saccade.plan.fold import cut_lines, fold_lines, fold_prose
from saccade.plan.problems import CHECK_LINES, show_causes, show_problems
from saccade.plan.show import show_bytes, show_device
from saccade.plan.types import Plan

NOTE_LINES = 8


@dataclass(frozen=True)
class Checked:
    """A plan, the bytes on the device of each rank of its layout, what the proof of all found in `seconds`, and what
    reading the bytes found, if they were read."""

    plan: Plan
    rank_bytes: tuple[int, ...]
    problems: tuple[Problem, ...]
    seconds: float
    contents: Contents | None = None

    @property
    def is_sound(self) -> bool:
        return not self.problems and (self.contents is None or not self.contents.problems)


def show_check(checked: Checked) -> str:
    """The proof in a line, or every problem; then what the bytes say."""
    plan, index = checked.plan, checked.plan.index
    size = show_bytes(sum(e.stop - e.start for e in index.entries.values()))
    what = f"{show_count(len(index.entries), 'tensor')} in {show_count(len(index.files), 'file')}, {size}"
    if checked.problems:
        lines = [f"{index.title}: incomplete, {show_count(len(checked.problems), 'problem')} ({what})"]
        lines.append(show_causes(checked.problems, index, CHECK_LINES))
    else:
        tp, ep, _ = plan.layout
        ranks = f"{tp} ranks proven (tp {tp}, ep {ep})" if tp > 1 else "1 rank proven"
        held = show_device(plan, checked.rank_bytes)
        lines = [f"{index.title}: complete, {what}; {ranks} in {checked.seconds:.2f} s; device: {held}"]
    lines += show_notes(index)
    if checked.contents is not None:
        lines += _show_contents(checked.contents)
    return "\n".join(lines)


def show_notes(index: Index) -> list[str]:
    """Files that index.json does not list, and what becomes of each."""
    return [f"note: {line}" for line in cut_lines(fold_prose(index.notes), NOTE_LINES)]


def _show_contents(found: Contents) -> Iterator[str]:
    speed = f"{show_bytes(found.read_bytes)} in {found.seconds:.2f} s by {show_count(found.threads, 'thread')}"
    bound = f"buffers and temporaries of at most {show_bytes(found.memory_bytes)}"
    outcome = show_count(len(found.problems), "problem") if found.problems else "sound"
    if found.notes:
        outcome += f", {show_count(len(found.notes), 'note')}"
    if found.was_scanned or found.digests is not None:
        what = "contents" if found.was_scanned else "digests"  # of numbers that nobody looked at nothing is said
        yield f"{what}: {outcome}; read {speed}, {bound}"
    else:
        yield "contents: not read"
    if found.problems:
        yield show_problems(found.problems, CHECK_LINES)
    if found.notes:
        yield from (f"note: {line}" for line in show_problems(found.notes, CHECK_LINES).splitlines())
    if found.digests is not None:
        yield f"sha256: {show_count(found.digests, 'file')} as the list says"
    yield from show_upcasts(found.upcasts)


def show_upcasts(upcasts: Sequence[Upcast]) -> Iterator[str]:
    """Of the `wk` that are stored alike the range of their scales and the worst rounding."""
    alike: dict[tuple[str, bool], list[Upcast]] = {}
    for upcast in upcasts:
        alike.setdefault((upcast.stored, upcast.rounding == 0), []).append(upcast)
    for (stored, is_exact), group in alike.items():
        names = ", ".join(line.text for line in fold_lines(u.tensor for u in group))
        least = min((u.least_scale for u in group if u.least_scale is not None), default=None)
        largest = max((u.largest_scale for u in group if u.largest_scale is not None), default=None)
        span = "no scale" if least is None else f"scales {least:.2e} to {largest:.2e}"
        worst = max(group, key=lambda u: u.rounding)
        how = "exact, bit for bit"
        if not is_exact:
            bound = (
                f"bound 2^-8 = {UPCAST_BOUND:.1e}" if worst.rounding <= UPCAST_BOUND else "beyond 2^-8: tiny numbers"
            )
            how = f"rounds by at most {worst.rounding:.1e} ({bound}; {worst.tensor})"
        yield f"indexer: {names} ({len(group)}, {stored}): {span}; upcast to BF16 {how}"


def check_json(checked: Checked) -> dict[str, Any]:
    """As `show_check`, nothing folded. Keys:

    format: 1. root, tensors, files, file_bytes. layout {tp, ep, rank}, proof_seconds.
    rank_bytes: on the device, of each rank; device_bytes: of rank 0.
    sound: whether exit code is 0. notes: texts, as in `plan`. problems: kind, name, text of what the headers say.
    contents: null, or problems, notes, upcasts (tensor, stored, least_scale, largest_scale, column_blocks, scales,
        is_power_of_two, rounding), was_scanned, digests, read_bytes, seconds, threads, memory_bytes.
    """
    plan, found = checked.plan, checked.contents
    return {
        "format": 1,
        "root": plan.index.root,
        "tensors": len(plan.index.entries),
        "files": len(plan.index.files),
        "file_bytes": sum(e.stop - e.start for e in plan.index.entries.values()),
        "layout": plan.layout._asdict(),
        "device_bytes": plan.device_bytes,
        "rank_bytes": checked.rank_bytes,
        "proof_seconds": checked.seconds,
        "sound": checked.is_sound,
        "notes": list(plan.notes),
        "problems": [p._asdict() for p in checked.problems],
        "contents": None
        if found is None
        else {
            **vars(found),
            "problems": [p._asdict() for p in found.problems],
            "notes": [p._asdict() for p in found.notes],
            "upcasts": [u._asdict() for u in found.upcasts],
        },
    }
