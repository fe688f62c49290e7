"""Times the kernels of the indexer and of sparse attention on a GPU: python -m tools.kernel_bench.attention

Every variant is checked against reference.py, then 40 launches over as many caches and weights are captured in a CUDA
graph, so that nothing is found in the L2 that a step would not find there. One line each; what fails says why, and what
no longer fits into the time is named. Shapes: one rank of eight of DeepSeek V3.2.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import PAGE, reference
from saccade.kernels.attention.dense import DenseConfig, dense_attention
from saccade.kernels.attention.sparse_decode import AttendConfig, attend_values, sparse_attention
from saccade.kernels.attention.sparse_prefill import sparse_attention_of_many
from saccade.kernels.indexer.logits import ScoreConfig, index_logits
from saccade.kernels.indexer.select import SelectConfig, absorb, select, select_and_absorb
from saccade.kernels.types import Latents, Rotation

HEADS, NOPE, ROPE, LORA, VALUES = 16, 128, 64, 512, 128
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 2048
LAUNCHES, REPLAYS = 40, 5
SECONDS = 85.0  # after which no further variant is begun


class Caches:
    """Requests of one context length and `copies` of everything that a layer has of its own."""

    def __init__(self, requests: int, tokens: int, context: int, copies: int) -> None:
        self.t, self.context, self.copies = requests * tokens, context, copies
        device = torch.device("cuda")
        pages = context // PAGE
        self.page_table = (torch.randperm(requests * pages, device=device) + 1).view(requests, pages)
        rows = (requests * pages + 1) * PAGE
        self.request = torch.arange(requests, device=device).repeat_interleave(tokens)
        self.positions = torch.arange(context - tokens, context, device=device).repeat(requests)
        self.keys = [torch.randn(rows, INDEX_DIM, device=device).bfloat16() for _ in range(copies)]
        self.latent = [Latents(torch.randn(rows, LORA + ROPE, device=device).bfloat16()) for _ in range(copies)]
        self.w_uk = [torch.randn(HEADS, NOPE, LORA, device=device).bfloat16() / 11 for _ in range(copies)]
        self.w_uv = [torch.randn(HEADS, VALUES, LORA, device=device).bfloat16() / 22 for _ in range(copies)]
        self.index_q = torch.randn(self.t, INDEX_HEADS, INDEX_DIM, device=device)
        self.weights = torch.randn(self.t, INDEX_DIM + INDEX_HEADS, device=device)[:, INDEX_DIM:]
        self.q = torch.randn(self.t, HEADS, NOPE + ROPE, device=device)
        self.absorbed = torch.randn(self.t, HEADS, LORA + ROPE, device=device)
        angle = torch.randn(self.t, ROPE // 2, device=device)
        self.rotation = Rotation(angle.cos(), angle.sin())

    def logits(self, i: int, **knobs: Any) -> Tensor:
        return index_logits(
            self.index_q, self.weights, self.keys[i], self.page_table, self.request, self.positions, self.rotation,
            scale=0.011, config=ScoreConfig(**knobs),
        )  # fmt: skip

    def right_logits(self) -> Tensor:
        turned = reference.rotate(self.index_q[..., :ROPE], self.rotation, False)
        q = torch.cat([turned, self.index_q[..., ROPE:]], 2)
        weights = self.weights * 0.011
        return reference.index_logits(q, weights, self.keys[0], self.page_table, self.request, self.positions)

    def right_query(self) -> Tensor:
        taken = torch.einsum("thn,hnc->thc", self.q[..., :NOPE].double(), self.w_uk[0].double()).float()
        return torch.cat([taken, reference.rotate(self.q[..., NOPE:], self.rotation, True)], 2)

    def where(self) -> tuple[Tensor, Tensor]:
        return self.page_table, self.request


def measure(run: Callable[[int], object], copies: int, launches: int) -> float:
    """Median microseconds of one launch in a graph of `launches`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            run(i % copies)
    times = []
    for _ in range(REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return sorted(times[1:])[REPLAYS // 2]


class Report:
    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.left_out: list[str] = []

    def line(
        self, name: str, run: Callable[[int], Any], right: Callable[[Any], float], copies: int, read: float,
        flops: float = 0.0, launches: int = LAUNCHES,
    ) -> None:  # fmt: skip
        """read: bytes a launch must move; right: the error of a result."""
        if time.monotonic() - self.begun > SECONDS:
            self.left_out.append(name)
            return
        try:
            error = right(run(0))
            us = measure(run, copies, launches)
            rate = f"{read / us / 1e3:7.0f} GB/s {flops / us / 1e6:6.0f} TFLOP/s"
            print(f"{name:58} {us:8.2f} us {rate}  error {error:.1e}", flush=True)
        except Exception as error:
            print(f"{name:58} failed: {type(error).__name__}: {str(error)[-300:]}", flush=True)
            torch.cuda.synchronize()  # an error of the device itself ends here: nothing after it would be true

    def finish(self) -> None:
        print(f"{time.monotonic() - self.begun:.0f} s; left out: {', '.join(self.left_out) or 'nothing'}")


def largest(found: Tensor, right: Tensor) -> float:
    """Of the differences, relative to the largest number; infinities must stand in the same places."""
    if not torch.equal(found.isinf(), right.isinf()):
        return float("nan")
    seen = ~right.isinf()
    return float((found[seen] - right[seen]).abs().max() / right[seen].abs().max())


def differing(found: Tensor, right: Tensor) -> float:
    return float((found != right).sum())


DECODES = [(1, 8192), (8, 8192), (16, 8192)]


def time_decode(report: Report, caches: Caches, first: bool) -> None:
    t, s, n = caches.t, caches.context, caches.copies
    label = f"T={t} S={s // 1024}K"
    k = min(TOPK, s)
    right = caches.right_logits()
    read, flops = t * s * INDEX_DIM * 2, t * s * INDEX_HEADS * INDEX_DIM * 2
    variants: list[dict[str, Any]] = [{}, {"chunk": 64}, {"chunk": 128}, {"chunk": 256}, {"chunk": 512}]
    variants += [{"warps": 8, "chunk": 64}, {"tile": 128, "chunk": 128}] if first else [{"chunk": 1024}]
    for knobs in variants:
        report.line(
            f"score {label} {knobs}", lambda i, knobs=knobs: caches.logits(i, **knobs),  # type: ignore[misc]
            lambda x: largest(x, right), n, read, flops,
        )  # fmt: skip
    chosen = reference.select(right, caches.positions, k)
    for how in [None, SelectConfig(warps=32)]:
        report.line(
            f"select {label} {how}", lambda i, how=how: select(right, caches.positions, k, how),  # type: ignore[misc]
            lambda x: differing(x, chosen), n, t * s * 4,
        )  # fmt: skip
    query = caches.right_query()
    for how in [None, SelectConfig(warps=32)] + ([SelectConfig(columns=128)] if first else []):
        report.line(
            f"select_and_absorb {label} {how}",
            lambda i, how=how: select_and_absorb(  # type: ignore[misc]
                right, caches.positions, k, caches.q, caches.w_uk[i], caches.rotation, how
            ),
            lambda x: differing(x[0], chosen) + largest(x[1], query), n, t * s * 4 + HEADS * NOPE * LORA * 2,
        )  # fmt: skip
    if first:
        report.line(
            f"absorb {label}", lambda i: absorb(caches.q, caches.w_uk[i], caches.rotation),
            lambda x: largest(x, query), n, HEADS * NOPE * LORA * 2,
        )  # fmt: skip
    seen = reference.sparse_attention(caches.absorbed, caches.latent[0], *caches.where(), chosen, 0.01, LORA)
    values = torch.einsum("thc,hvc->thv", seen, caches.w_uv[0].float()).flatten(1)
    read = t * k * (LORA + ROPE) * 2 + HEADS * VALUES * LORA * 2
    options: list[dict[str, Any]] = [{}, {"splits": 16}, {"tile": 32, "splits": 64}, {"tile": 32}]
    if first:
        options += [{"tile": 32, "splits": 64, "warps": 4}, {"rows": 32}, {"rows": 128}, {"combine_warps": 4}]
    elif t > 1:
        options += [{"splits": 32}, {"splits": 8}, {"rows": 128}]
    for knobs in options:
        report.line(
            f"attend_values {label} {knobs}",
            lambda i, knobs=knobs: attend_values(  # type: ignore[misc]
                caches.absorbed, caches.latent[i], *caches.where(), chosen, 0.01, caches.w_uv[i], AttendConfig(**knobs)
            ),
            lambda x: largest(x, values), n, read,
        )  # fmt: skip
    report.line(
        f"sparse_attention {label}",
        lambda i: sparse_attention(caches.absorbed, caches.latent[i], *caches.where(), chosen, 0.01, LORA),
        lambda x: largest(x, seen), n, read,
    )  # fmt: skip


def time_prefill(report: Report, tokens: int, context: int) -> None:
    caches = Caches(1, tokens, context, 2)
    label = f"T={tokens} S={context // 1024}K"
    mean = context - tokens / 2
    right = caches.right_logits()
    flops = tokens * mean * INDEX_HEADS * INDEX_DIM * 2
    for knobs in [{}, {"tile": 128, "warps": 8}, {"tokens": 1}, {"stages": 2}, {"chunk": 8192}]:
        report.line(
            f"score {label} {knobs}", lambda i, knobs=knobs: caches.logits(i, **knobs),  # type: ignore[misc]
            lambda x: largest(x, right), 2, tokens * context * 4, flops, 4,
        )  # fmt: skip
    chosen = reference.select(right, caches.positions, TOPK)
    report.line(
        f"select {label}", lambda i: select(right, caches.positions, TOPK), lambda x: differing(x, chosen), 2,
        tokens * context * 4, launches=4,
    )  # fmt: skip
    flops = tokens * TOPK * HEADS * (2 * LORA + ROPE) * 2
    seen = reference.sparse_attention(caches.absorbed, caches.latent[0], *caches.where(), chosen, 0.01, LORA)
    for attend in (sparse_attention_of_many, sparse_attention):
        report.line(
            f"{attend.__name__} {label}",
            lambda i, attend=attend: attend(  # type: ignore[misc]
                caches.absorbed, caches.latent[i], *caches.where(), chosen, 0.01, LORA
            ),
            lambda x: largest(x, seen), 2, tokens * TOPK * (LORA + ROPE) * 2, flops, 4,
        )  # fmt: skip
    caches.positions -= context - tokens
    everything = reference.select_all(caches.positions, TOPK)
    seen = reference.sparse_attention(caches.absorbed, caches.latent[0], *caches.where(), everything, 0.01, LORA)
    for knobs in [{}, {"tile": 64}, {"warps": 4}]:
        report.line(
            f"dense_attention T={tokens} S={tokens} {knobs}",
            lambda i, knobs=knobs: dense_attention(  # type: ignore[misc]
                caches.absorbed, caches.latent[i], *caches.where(), caches.positions, 0.01, LORA, DenseConfig(**knobs)
            ),
            lambda x: largest(x, seen), 2, 0, flops / TOPK * tokens / 2, 4,
        )  # fmt: skip


def time_attention_kernels() -> None:
    print(torch.cuda.get_device_name())
    report = Report()
    torch.manual_seed(0)
    for t, context in DECODES:
        time_decode(report, Caches(t, 1, context, 40 // t + 4), first=t == 1)
        torch.cuda.empty_cache()
    time_prefill(report, 2048, 8192)
    time_decode(report, Caches(1, 1, 131072, 4), first=False)
    report.finish()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    time_attention_kernels()
