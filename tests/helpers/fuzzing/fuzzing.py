"""What all fuzzing shares: hostile values, mutations of JSON and of bytes, and a guard on time and memory.

A case is a number: the same number makes the same input. Who mutates what: fuzz_headers.py, fuzz_checkpoints.py; the
tests are in test_fuzz.py.
"""

import copy
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 20  # a case takes some milliseconds
MEMORY = 256 << 20  # bytes of address space that a case may take; the largest mutant has 2 MB

NUMBERS = (
    0, 1, -1, 2, 7, 127, 128, 129, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63),
    0.5, 1.0, 1e308, float("inf"), float("nan"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "\x1b[2J", "\ud800", "\u202e", "é" * 9, "x" * 301, "../x.safetensors", "/dev/zero", "__metadata__",
    "dtype", "F32", "BF16", "F8_E4M3", "model.safetensors", "null", "%s%n", "model.layers.999999999999.x", "0" * 5000,
)  # fmt: skip
TOKENS = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"[" * 5000, b'{"a":' * 2000, b"\xff", b"\xef\xbb\xbf", b"\\ud800",
    b'"', b"\\", b",", b":", b"{", b"}", b"[", b"]", b"null", b"true", b"\0", b"\n" * 100, b"//", b"'", b"0x10", b"01",
)  # fmt: skip


class Failure(AssertionError):
    """What a case showed that must not be."""


@contextmanager
def bounded() -> Iterator[None]:
    """End a case that hangs or takes memory: TimeoutError, MemoryError (torch: RuntimeError) are raised inside it.

    The bound on memory needs Linux's /proc; elsewhere only time is bounded.
    """

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    old, statm = signal.signal(signal.SIGALRM, ring), Path("/proc/self/statm")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, old)


def run_cases(name: str, judge: Callable[[int], str], cases: range) -> Counter[str]:
    """Judge each case; Failure names the first that fails, and how to repeat it. Counts outcomes by kind."""
    outcomes: Counter[str] = Counter()
    for case in cases:
        try:
            with bounded():
                outcomes[judge(case)] += 1
        except Exception as e:
            again = f"repeat it with: python tests/helpers/fuzzing {name} {case}"
            raise Failure(f"case {case} of {name}: {type(e).__name__}: {e}; {again}") from e
    return outcomes


def hostile(dice: Random) -> Any:
    """A value that nobody expects."""
    kind = dice.randrange(6)
    if kind == 0:
        return dice.choice((None, [], {}, [[]], [None], {"": ""}, [0] * 40))
    if kind == 1:
        return [dice.choice(NUMBERS) for _ in range(dice.randrange(4))]
    return dice.choice(TEXTS) if kind == 2 else dice.choice(NUMBERS)


def near(number: int, dice: Random) -> int:
    return dice.choice((number + 1, number - 1, 2 * number, number // 2, -number, number + 128, number ^ 1 << 40))


def mutate_json(value: Any, dice: Random) -> Any:
    """A copy of a JSON value with one place changed."""
    value = copy.deepcopy(value)
    place, at = value, None
    while isinstance(place, dict | list) and len(place):
        holder = place
        at = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
        place = holder[at]
        if dice.random() < 0.3:
            break
    if at is None:
        return hostile(dice)
    kind = dice.randrange(6)
    if kind == 0:
        del holder[at]
    elif kind == 1 and isinstance(holder, dict):
        holder[dice.choice(TEXTS)] = holder.pop(at)
    elif kind <= 3 and type(place) is int:
        holder[at] = near(place, dice)
    elif kind == 4:
        holder[at] = copy.deepcopy(dice.choice(list(holder.values()) if isinstance(holder, dict) else holder))
    else:
        holder[at] = hostile(dice)
    return value


def mutate_bytes(raw: bytes, dice: Random) -> bytes:
    """Bytes with one place changed: a bit, a byte, a hostile word, a part lost, doubled, moved, cut or added."""
    at, size = dice.randrange(len(raw) + 1), dice.choice((1, 1, 2, 8, 60))
    kind = dice.randrange(9)
    if kind == 0 and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + dice.randbytes(size) + raw[at + size :]
    if kind == 2:
        return raw[:at] + dice.choice(TOKENS) + raw[at + dice.choice((0, 1)) :]
    if kind == 3:
        return raw[:at] + raw[at + size :]
    if kind == 4:
        return raw[: at + size] + raw[at:]
    if kind == 5:
        to = dice.randrange(len(raw) + 1)
        return raw[:to] + raw[at : at + size] + raw[to + size :]
    if kind == 6:
        return raw[:at]
    digits = [i for i, b in enumerate(raw) if 48 <= b < 58]
    if kind == 7 and digits:  # another digit: JSON stays JSON
        at = dice.choice(digits)
        return raw[:at] + b"%d" % dice.randrange(10) + raw[at + 1 :]
    return raw + dice.randbytes(size)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def change_files(files: dict[str, bytes], dice: Random) -> None:
    """Files are lost, cut, overwritten, copied, renamed or exchanged."""
    name = dice.choice(list(files))
    raw, kind = files[name], dice.randrange(8)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = raw[: dice.randrange(len(raw) + 1)]
    elif kind == 2:
        files[name] = mutate_bytes(raw[:4000], dice) + raw[4000:]
    elif kind == 3:
        files[name] = dice.choice((b"", POINTER, b"<!DOCTYPE html>" * 9, bytes(len(raw)), b"\x80\x04PK"))
    elif kind == 4:
        files[dice.choice(("copy.safetensors", "model.safetensors.part", "x.bin"))] = raw
    elif kind == 5:
        files[dice.choice(("renamed.safetensors", ".hidden.safetensors", "a\nb.safetensors"))] = files.pop(name)
    elif kind == 6:
        other = dice.choice(list(files))
        files[name], files[other] = files[other], raw
    else:
        at = dice.randrange(len(raw) + 1)
        files[name] = raw[:at] + bytes(min(4096, len(raw) - at)) + raw[at + 4096 :]  # a page of zeros
