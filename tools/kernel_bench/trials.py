"""What the benches of products share: random codes and weights, compiling side by side, timing in CUDA graphs."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from saccade.engine.shared import make_current
from saccade.kernels.types import Matrix

Thunk = Callable[[], Tensor]


def codes(*shape: int) -> Tensor:
    """E4M3 codes of any value but NaN."""
    return (
        (torch.randint(0, 254, shape, dtype=torch.uint8, device="cuda") ^ 0x80).clamp(max=253).view(torch.float8_e4m3fn)
    )


def blocks(*shape: int) -> Matrix:
    *lead, rows, columns = shape
    scale = torch.rand(*lead, -(-rows // 128), -(-columns // 128), device="cuda") * 1e-3 + 1e-5
    return Matrix(codes(*shape), scale)


def bf16(rows: int, columns: int) -> Matrix:
    return Matrix(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5)


def route_evenly(tokens: int, topk: int = 8, experts: int = 256) -> tuple[Tensor, Tensor]:
    """Different experts of each token, any of them as likely as any other; and their weights."""
    chosen = torch.rand(tokens, experts, device="cuda").topk(topk, 1).indices
    return chosen, torch.rand(tokens, topk, device="cuda")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def size(parts: Sequence[Matrix | Tensor]) -> int:
    return sum(t.nbytes for w in parts for t in (w if isinstance(w, Matrix) else [w]) if isinstance(t, Tensor))


def compile_all(thunks: Sequence[Thunk]) -> None:
    """Side by side, first calls: whatever fails will fail again where it is reported.

    A thread's memory may all come out of torch's allocator, which asks no driver: each begins with a call that does.
    """

    def attempt(thunk: Thunk) -> None:
        try:
            thunk()
        except Exception as e:
            print("compile:", type(e).__name__, str(e)[:200])

    start = time.perf_counter()
    with ThreadPoolExecutor(12, initializer=make_current, initargs=("cuda",)) as pool:
        list(pool.map(attempt, thunks))
    torch.cuda.synchronize()
    print(f"{len(thunks)} variants compiled in {time.perf_counter() - start:.1f} s")


def time_graph(calls: Sequence[Thunk], replays: int = 5) -> float:
    """us of one of `calls`, captured one after the other."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / len(calls))
    return best


def report(name: str, run: Callable[[], str]) -> None:
    try:
        print(f"{name:58} {run()}", flush=True)
    except Exception as e:
        print(f"{name:58} {type(e).__name__}: {str(e)[:160]}", flush=True)
