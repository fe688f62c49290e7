"""The indexer's projection in six arrangements, as single operations with cold weights.

Each arm runs over 64 different sets of weights in one CUDA graph, alone and behind a launch of `q_a | kv_a`, which (e)
and (f) contain: what an arm costs a layer is its time with `q_a | kv_a` less that of `q_a | kv_a` alone. Inside the
whole model the same comparison is `bench decode` with several arrangements. Next: arms.py.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from saccade.bench.projection.arms import ARMS, Arm, ArmError, Operands, find_error, make_operands, project_qkv_a
from saccade.bench.record import (
    Record,
    describe_run,
    find_device,
    measure_bandwidth,
    print_table,
    require_counts,
    show_run,
    time_samples,
)
from saccade.bench.room import left_out, require_measured
from saccade.bench.shapes import find_shape
from saccade.models.dsa.config import ModelConfig

FAILURES = (ArmError, RuntimeError, ValueError)  # of an arm that cannot run here
SETS = 64  # 117 MB for the arms with the fewest bytes: twice the L2 cache
INDEXER_COLUMNS = (
    ("arm", "", ""), ("arrangement", "arrangement", ""), ("batch", "batch", "d"), ("us", "us alone", ".2f"),
    ("us_with_qkv_a", "with q_a|kv_a", ".2f"), ("us_a_layer", "us a layer", ".2f"), ("bytes_us", "bytes need", ".2f"),
    ("error", "error", ".1e"), ("failed", "", ""),
)  # fmt: skip


def bench_indexer(
    shape: str = "v32-rank-of-8",
    batches: Sequence[int] = (1, 4, 16),
    sets: int = SETS,
    repeats: int = 7,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """One record for each arm and batch; an arm that cannot run has `failed` instead of times."""
    require_counts(sets=sets, repeats=repeats)
    at = find_device(device)
    config = find_shape(shape).config
    bandwidth = measure_bandwidth(at)
    run = {**describe_run(at, commit), "shape": shape, "layers": 1, "context": None, "sets": sets}
    run["read_bandwidth_gb_s"] = bandwidth / 1e9
    records: list[Record] = []
    for batch in batches:
        with left_out(f"batch {batch}", at, say):
            for found in measure_batch(config, batch, sets, at, seed, repeats, say):
                seconds = found.get("us_with_qkv_a", found.get("us"))
                share = None if seconds is None else found["bytes"] / (seconds * 1e-6) / bandwidth
                records.append({
                    **run, **found, "bytes_us": found["bytes"] / bandwidth * 1e6, "share_of_bandwidth": share,
                })  # fmt: skip
    require_measured(records)
    return records


def measure_batch(
    config: ModelConfig,
    batch: int,
    sets: int,
    at: torch.device,
    seed: int,
    repeats: int,
    say: Callable[[str], None],
) -> Iterator[Record]:
    """All arms at one batch."""
    operands = make_operands(config, batch, sets, at, seed)
    base = measure_arm(project_qkv_a, operands, repeats)
    say(f"batch {batch}: q_a | kv_a alone {base if isinstance(base, str) else f'{statistics.median(base):.2f} us'}")
    for arm in ARMS:
        found = compare_arm(arm, operands, base, repeats)
        say(f"batch {batch}: ({arm.key}) {arm.name}: {found}")
        yield {
            "arm": arm.key, "arrangement": arm.name, "batch": batch, **found, "bytes": count_arm_bytes(config, arm),
        }  # fmt: skip


def compare_arm(arm: Arm, operands: Sequence[Operands], base: list[float] | str, repeats: int) -> dict[str, Any]:
    """Error and times of an arm, microseconds; {"failed": why} if it cannot run."""
    try:
        error = find_error(arm, operands[0])
    except FAILURES as error:
        return {"failed": show_failure(error)}
    found: dict[str, Any] = {"error": error}
    alone = measure_arm(arm.run, operands, repeats)
    if isinstance(alone, str):
        return {**found, "failed": alone}
    both = alone
    if not arm.has_qkv_a:
        found |= {"us": statistics.median(alone), "samples_us": alone}
        measured = measure_arm(lambda o: (*project_qkv_a(o), *arm.run(o)), operands, repeats)
        if isinstance(measured, str):
            return found
        both = measured
    found |= {"us_with_qkv_a": statistics.median(both), "samples_us_with_qkv_a": both}
    if not isinstance(base, str):
        found["us_a_layer"] = found["us_with_qkv_a"] - statistics.median(base)
    return found


def measure_arm(
    run: Callable[[Operands], tuple[torch.Tensor, ...]], operands: Sequence[Operands], repeats: int
) -> list[float] | str:
    """Microseconds of one run, in each of `repeats` samples; or why it failed."""
    device = operands[0].x.device
    try:
        run(operands[0])  # compiles
        replay = capture_work(lambda: [run(o) for o in operands], device)
    except FAILURES as error:
        return show_failure(error)
    replay()
    return [ms * 1e3 / len(operands) for ms in time_samples(replay, device, repeats)]


def show_failure(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def capture_work(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph; on a CPU, itself."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def count_arm_bytes(c: ModelConfig, arm: Arm) -> float:
    """Weights that an arm reads, with `q_a | kv_a`: 17.0 MB of DeepSeek-V3.2's with FP8 wk, 17.9 with BF16 wk."""
    hidden, rows = c.hidden_size, c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim
    wk = 2 if arm.key in "de" else 1
    return float(hidden * (rows + c.index_head_dim * wk + c.index_n_heads * 2))


def show_indexer(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    return show_run(
        print_table(records, INDEXER_COLUMNS),
        one,
        "us a layer: with q_a|kv_a, less q_a|kv_a alone; bytes need: q_a|kv_a and the indexer's, at the read bandwidth",
        f"one rank, no communication; {one['sets']} sets of weights in turn, one CUDA graph",
    )
