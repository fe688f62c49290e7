"""What a sum over ranks takes, by the bytes of the message: ours, NCCL, gloo.

"ours" is what operations get: pushed while there is room, by NCCL beyond it. On GPUs sums are timed in a CUDA graph,
one behind the other, as a step has them; gloo, which a graph cannot hold, one by one. Each is checked first, against
the sum in rank order, and between the ranks, bit by bit. Next: parallel/device.py.
"""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.bench.record import Record, describe_run, find_device, print_table, require_counts, show_run, time_samples
from saccade.errors import RequestError
from saccade.parallel.distributed import DistributedRanks
from saccade.parallel.ranks import Ranks

HIDDEN = 7168  # of DeepSeek-V3.2: a row is 28 KB in fp32
ROWS_OF_MESSAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 4681)  # to 128 MB
SHORT_BYTES = 8 << 20  # beyond: fewer sums in a sample, and none by gloo


class SumWay(NamedTuple):
    name: str
    run: Callable[[Tensor], object]
    is_captured: bool
    most_bytes: int = 1 << 62


def bench_allreduce(
    ranks: Ranks, device: str, repeats: int = 7, commit: str | None = None, say: Callable[[str], None] = lambda _: None,
    rows: Sequence[int] = ROWS_OF_MESSAGES,
) -> list[Record]:  # fmt: skip
    """One record for each size of message. All ranks ask for it together."""
    require_counts(repeats=repeats)
    if not isinstance(ranks, DistributedRanks):
        raise RequestError("allreduce needs ranks: --tp 2, or more")
    at = find_device(device)
    common = {**describe_run(at, commit), "tp": ranks.layout.tp, "unit": "microseconds"}
    records = []
    shapes = [(1, HIDDEN // 2), *((n, HIDDEN) for n in rows)]
    for shape in shapes if at.type == "cuda" else [s for s in shapes if 4 * s[0] * s[1] <= SHORT_BYTES]:
        records.append({**common, "rows": shape[0], "columns": shape[1], **measure_sums(ranks, shape, at, repeats)})
        say(f"{show_size(records[-1]['bytes'])}: {records[-1]['us']}")
    return records


@torch.inference_mode()
def measure_sums(ranks: DistributedRanks, shape: tuple[int, int], at: torch.device, repeats: int) -> Record:
    tp, rank = ranks.layout.tp, ranks.layout.rank
    parts = [torch.randn(shape, generator=torch.Generator(at).manual_seed(r), device=at) for r in range(tp)]
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    mine, nbytes = parts[rank], expected.nbytes
    del parts
    taken: dict[str, float] = {}
    wrong: list[str] = []
    for way in find_ways(ranks, mine, at):
        if nbytes > way.most_bytes:
            continue
        scratch = mine.clone()
        found = way.run(scratch)
        total = found if isinstance(found, Tensor) else scratch
        sums = set(ranks.collect(hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()))
        in_order = bool(total.equal(expected))
        if len(sums) > 1 or not (in_order or torch.allclose(total, expected, rtol=1e-4, atol=1e-4)):
            wrong.append(way.name)
        taken[way.name] = time_way(way, scratch, at, repeats)
    return {"bytes": nbytes, "us": {name: round(us, 2) for name, us in taken.items()}, "wrong": wrong}


def find_ways(ranks: DistributedRanks, part: Tensor, at: torch.device) -> list[SumWay]:
    if at.type != "cuda":
        return [SumWay("gloo", ranks.add_up, False, SHORT_BYTES)]
    import torch.distributed as dist

    from saccade.kernels.collective.push import count_blocks, push_sum
    from saccade.parallel.device import DeviceRanks

    assert isinstance(ranks, DeviceRanks)
    is_short, has_nccl = ranks.has_room(part, part.shape[1]), ranks.device.type == "cuda"
    ways = [SumWay("ours", ranks.add_up, is_short or has_nccl)]
    if is_short and ranks.memory is not None and count_blocks(*part.shape) <= ranks.memory.peers.blocks:
        peers = ranks.memory.peers
        ways += [
            SumWay("one step", lambda x: push_sum(peers, x, steps=1), True),
            SumWay("two steps", lambda x: push_sum(peers, x, steps=2), True),
        ]
    if has_nccl:
        ways.append(SumWay("NCCL", lambda x: dist.all_reduce(x, group=ranks.group), True))
        ways.append(SumWay("NCCL in rank order", lambda x: DistributedRanks.add_up(ranks, x), True))
    return [*ways, SumWay("gloo", ranks.hosts.add_up, False, SHORT_BYTES)]


def time_way(way: SumWay, scratch: Tensor, at: torch.device, repeats: int) -> float:
    """Microseconds of one sum, the median."""
    if not way.is_captured:
        count = 3 if at.type == "cuda" else 10
        return 1e3 * statistics.median(time_samples(lambda: way.run(scratch), at, min(repeats, 5), count))
    count = 50 if scratch.nbytes <= SHORT_BYTES else 5
    torch.cuda.synchronize(at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(count):
            way.run(scratch)
    graph.replay()
    return 1e3 * statistics.median(time_samples(graph.replay, at, repeats)) / count


def show_size(nbytes: int) -> str:
    return f"{nbytes / 1024:.0f} KB" if nbytes < 1 << 20 else f"{nbytes / 2**20:.1f} MB"


def show_allreduce(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    names = list(dict.fromkeys(name for r in records for name in r["us"]))
    columns: list[tuple[str, str, str]] = [("size", "message", ""), ("rows", "rows", "d")]
    columns += [(name, f"{name}, us", ".1f") for name in names]
    lines: list[dict[str, Any]] = [{"size": show_size(r["bytes"]), "rows": r["rows"], **r["us"]} for r in records]
    wrong = [f"{show_size(r['bytes'])} by {name}" for r in records for name in r["wrong"]]
    notes = [f"fp32, {one['tp']} ranks, {one['date']}"]
    if wrong:
        notes.append(f"WRONG sums, or other bits on other ranks: {', '.join(wrong)}")
    return show_run(print_table(lines, columns), one, *notes)
