"""Products and experts at the shapes of one rank of DeepSeek-V3.2 over eight: errors, times, variants of the knobs.

python -m tools.kernel_bench.gemm [few] [many] [experts] [packed]: on a GPU, under 100 s in all. Weights rotate through
more memory than the L2 cache holds; times are of CUDA graphs, the best of several replays. A line that fails says why.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.activations import write_activations
from saccade.kernels.linear.gemm import GEMM, GemmConfig, multiply_blocks
from saccade.kernels.linear.split_k import SPLIT_K, SplitKConfig, split_k
from saccade.kernels.moe.grouped_gemm import expert_mlp
from saccade.kernels.moe.packed import packed_experts
from saccade.kernels.types import Matrix
from tools.kernel_bench.trials import Thunk, bf16, blocks, compile_all, error, report, route_evenly, size, time_graph

SETS = 40


def bench_few() -> None:
    shapes: dict[str, tuple[int, list[Callable[[], Matrix | Tensor]], bool]] = {
        "qkv_a + wk": (7168, [lambda: blocks(2112, 7168), lambda: bf16(192, 7168)], False),
        "q_b + wq_b": (1536, [lambda: blocks(3072, 1536), lambda: blocks(8192, 1536)], False),
        "o_proj": (2048, [lambda: blocks(7168, 2048)], False),
        "shared gate_up + gate": (7168, [lambda: blocks(512, 7168), lambda: bf16(256, 7168)], False),
        "dense down, gated": (2304, [lambda: blocks(7168, 2304)], True),
        "head": (7168, [lambda: bf16(16160, 7168)], False),
    }
    variants = {
        "columns 256": SPLIT_K._replace(columns=256), "rows 128": SPLIT_K._replace(rows=128, warps=8),
        "264 programs": SPLIT_K._replace(programs=264), "1056 programs": SPLIT_K._replace(programs=1056),
        "1056, least 1": SPLIT_K._replace(programs=1056, least=1), "stages 6": SPLIT_K._replace(stages=6),
        "no prefetch": SPLIT_K._replace(prefetch=False),
    }  # fmt: skip
    sets = {
        name: [[f() for f in makers] for _ in range(4 if name == "head" else SETS)]
        for name, (_, makers, _) in shapes.items()
    }

    def call(name: str, tokens: int, index: int, knobs: SplitKConfig = SPLIT_K) -> Thunk:
        k, _, gated = shapes[name]
        x = torch.randn(tokens, 2 * k if gated else k, device="cuda")
        norm = (torch.rand(k, device="cuda"), 1e-6) if not gated else None
        return lambda: split_k(x, sets[name][index], norm=norm, gated=gated, config=knobs)

    tried = ["qkv_a + wk", "q_b + wq_b", "o_proj"]
    first = [call(name, tokens, 0) for name in shapes for tokens in (4, 16)]
    compile_all(first + [call(name, 4, 0, knobs) for name in tried for knobs in variants.values()])

    def check(name: str, tokens: int) -> str:
        k, _, gated = shapes[name]
        x, weight = torch.randn(tokens, 2 * k if gated else k, device="cuda"), torch.rand(k, device="cuda")
        parts = sets[name][0]
        y = split_k(x, parts, norm=None if gated else (weight, 1e-6), gated=gated)
        a = reference.silu_and_mul(x) if gated else reference.rms_norm(x, weight, 1e-6)
        wanted = torch.cat([a.double() @ reference.decode(w).double().t() for w in parts], 1)
        same = torch.equal(y, split_k(x, parts, norm=None if gated else (weight, 1e-6), gated=gated))
        each, at = [], 0
        for w in parts:
            width = (w.data if isinstance(w, Matrix) else w).shape[0]
            each.append(f"{error(y[:, at : at + width], wanted[:, at : at + width]):.1e}")
            at += width
        return f"errors {' '.join(each)}, same bits {same}"

    def measure(name: str, tokens: int, knobs: SplitKConfig) -> str:
        count = len(sets[name])
        us = time_graph([call(name, tokens, i, knobs) for i in range(count)])
        return f"{us:7.2f} us {size(sets[name][0]) / us / 1e3:7.0f} GB/s"

    for name in shapes:
        for tokens in (2, 16):
            report(f"few {name} T={tokens}", lambda n=name, t=tokens: check(n, t))  # type: ignore[misc]
    for name in shapes:
        for tokens in (2, 4, 8, 16):
            report(f"few {name} T={tokens}", lambda n=name, t=tokens: measure(n, t, SPLIT_K))  # type: ignore[misc]
    for name in tried:
        for label, knobs in variants.items():
            report(f"few {name} T=4 {label}", lambda n=name, k=knobs: measure(n, 4, k))  # type: ignore[misc]


def bench_many() -> None:
    shapes = {
        "qkv_a": (2112, 7168),
        "q_b": (3072, 1536),
        "wq_b": (8192, 1536),
        "o_proj": (7168, 2048),
        "dense gate_up": (4608, 7168),
        "shared down": (7168, 256),
    }
    tiles = {
        "default": GEMM, "64x64x128": GemmConfig(rows=64, columns=128), "64x128x64": GemmConfig(rows=64, tokens=128),
        "128x64x128 2 stages": GemmConfig(columns=128, stages=2), "8 warps": GemmConfig(warps=8),
        "4 stages": GemmConfig(stages=4),
    }  # fmt: skip
    weights = {name: blocks(*shape) for name, shape in shapes.items()}

    def prepared(name: str, tokens: int, tile: GemmConfig) -> Thunk:
        x = write_activations(torch.randn(tokens, shapes[name][1], device="cuda"), fp16=True, permuted=True).fp16
        # As a layer multiplies: what ends in its hidden size is added to the stream.
        n = shapes[name][0]
        residual = torch.randn(tokens, n, device="cuda") if n == 7168 else None
        return lambda: multiply_blocks(x, weights[name], residual, tile)

    compile_all([prepared(name, 256, tile) for name in shapes for tile in tiles.values()])

    def check(name: str, tile: GemmConfig) -> str:
        x, w = torch.randn(300, shapes[name][1], device="cuda"), weights[name]
        wanted = x.double() @ reference.decode(w).double().t()
        found = multiply_blocks(write_activations(x, fp16=True, permuted=True).fp16, w, tile=tile)
        return f"error {error(found, wanted):.1e}"

    def measure(name: str, tokens: int, tile: GemmConfig) -> str:
        n, k = shapes[name]
        us = time_graph([prepared(name, tokens, tile)] * 3, 3)
        return f"{us:8.1f} us {2 * tokens * n * k / us / 1e6:6.0f} TFLOP/s"

    def library(name: str, tokens: int) -> str:
        n, k = shapes[name]
        x, w = bf16(tokens, k).data, bf16(n, k).data
        us = time_graph([lambda: torch.mm(x, w.t(), out_dtype=torch.float32)] * 3, 3)
        return f"{us:8.1f} us {2 * tokens * n * k / us / 1e6:6.0f} TFLOP/s"

    def convert(tokens: int) -> str:
        x = torch.randn(tokens, 7168, device="cuda")
        us = time_graph([lambda: write_activations(x, fp16=True, permuted=True).fp16.numbers] * 3, 3)
        return f"{us:8.1f} us {tokens * 7168 * 8 / us / 1e3:6.0f} GB/s"

    for label, tile in tiles.items():
        report(f"many qkv_a {label}", lambda t=tile: check("qkv_a", t))  # type: ignore[misc]
    for tokens in (4096, 8192):
        report(f"many operand [{tokens}, 7168] f32 -> 2 fp16", lambda t=tokens: convert(t))  # type: ignore[misc]
        for name in shapes:
            report(f"many {name} T={tokens} torch.mm BF16", lambda n=name, t=tokens: library(n, t))  # type: ignore[misc]
            for label, tile in tiles.items():
                report(f"many {name} T={tokens} {label}", lambda n=name, t=tokens, i=tile: measure(n, t, i))  # type: ignore[misc]


def bench_experts() -> None:
    gate_up, down = blocks(256, 512, 7168), blocks(256, 7168, 256)
    variants: dict[str, tuple[GemmConfig, GemmConfig]] = {
        "default": (GEMM, GEMM), "4 stages": (GemmConfig(stages=4), GemmConfig(stages=4)),
        "down 128 columns": (GEMM, GemmConfig(columns=128, stages=2)),
        "8 warps": (GemmConfig(warps=8), GemmConfig(warps=8)),
        "gate 64 rows": (GemmConfig(rows=64), GEMM),
    }  # fmt: skip

    def call(tokens: int, tiles: tuple[GemmConfig, GemmConfig]) -> Thunk:
        x = torch.randn(tokens, 7168, device="cuda")
        experts, weights = route_evenly(tokens)
        return lambda: expert_mlp(x, experts, weights, gate_up, down, tiles)

    compile_all([call(tokens, tiles) for tokens in (4096, 8192) for tiles in variants.values()])

    def check() -> str:
        x = torch.randn(2048, 7168, device="cuda")
        experts, weights = route_evenly(2048)
        y = expert_mlp(x, experts, weights, gate_up, down)
        wanted = reference.expert_mlp(x[:48], experts[:48], weights[:48], gate_up, down)
        same = torch.equal(y, expert_mlp(x, experts, weights, gate_up, down))
        return f"error {error(y[:48], wanted):.1e}, same bits {same}"

    def measure(tokens: int, tiles: tuple[GemmConfig, GemmConfig]) -> str:
        us = time_graph([call(tokens, tiles)] * 2, 3)
        return f"{us:8.1f} us {6 * tokens * 8 * 256 * 7168 / us / 1e6:6.0f} TFLOP/s"

    report("experts T=2048", check)
    for tokens in (4096, 8192):
        for label, tiles in variants.items():
            report(f"experts T={tokens} {label}", lambda t=tokens, i=tiles: measure(t, i))  # type: ignore[misc]


def nvfp4(experts: int, rows: int, columns: int, runs: int) -> Matrix:
    data = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0x30, 0x40, (experts, rows, columns // 16), dtype=torch.uint8, device="cuda")
    return Matrix(
        data, scale.view(torch.float8_e4m3fn), (1, 16), "e2m1", torch.rand(experts, runs, 1, device="cuda") * 0.01
    )


def bench_packed() -> None:
    gate_up, down = nvfp4(256, 512, 7168, 2), nvfp4(256, 7168, 256, 1)
    variants: dict[str, dict] = {
        "default": {}, "rows 1, 4": {"rows": (1, 4)}, "rows 2, 8": {"rows": (2, 8)},
        "rows 4, 16": {"rows": (4, 16)},
    }  # fmt: skip

    def call(tokens: int, options: dict) -> Thunk:
        x = torch.randn(tokens, 7168, device="cuda")
        experts, weights = route_evenly(tokens)
        return lambda: packed_experts(x, experts, weights, gate_up, down, **options)

    compile_all([call(1, v) for v in variants.values()] + [call(8, {})])

    def check(tokens: int) -> str:
        x = torch.randn(tokens, 7168, device="cuda")
        experts, weights = route_evenly(tokens)
        few = packed_experts(x, experts, weights, gate_up, down)
        many = expert_mlp(x, experts, weights, gate_up, down)
        wanted = reference.expert_mlp(x, experts, weights, gate_up, down)
        return f"error {error(few, wanted):.1e}, on tensor cores {error(many, wanted):.1e}"

    def measure(tokens: int, options: dict) -> str:
        us = time_graph([call(tokens, options) for _ in range(SETS)])
        pair = sum(t.nbytes for w in (gate_up, down) for t in w if isinstance(t, Tensor)) / 256
        return f"{us:7.2f} us {tokens * 8 * pair / us / 1e3:7.0f} GB/s"

    report("packed T=8", lambda: check(8))
    for label, options in variants.items():
        for tokens in (1, 8):
            report(f"packed NVFP4 T={tokens} {label}", lambda t=tokens, o=options: measure(t, o))  # type: ignore[misc]


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    start = time.perf_counter()
    benches = {"few": bench_few, "many": bench_many, "experts": bench_experts, "packed": bench_packed}
    for name in sys.argv[1:] or benches:
        benches[name]()
        torch.cuda.empty_cache()
        print(f"{name} done after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
