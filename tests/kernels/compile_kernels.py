"""Compile every kernel that a step launches, for a Hopper GPU, where there is none: `python compile_kernels.py "decode 8 8192"`.

The interpreter takes programs that the compiler refuses: names that change their type in a loop, shapes that are no
powers of two. So the model runs here on meta tensors, no launch is made, and each kernel is compiled.
"""

import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from saccade.api.compiling.launches import NewKernel, note_launches
from saccade.api.compiling.meta_model import META

# Kernels that hold so much in registers that a spill would be most of their traffic.
NO_SPILLS = (
    "_find_gates",
    "_run_tokens",
    "_make_terms",
    "_solve_chunks",
    "_scan_chunks",
    "_write",
    "_read",
    "_merge",
    "_attend_masked",
    "_score_prompt",
    "_multiply_codes",
    "_multiply_few",
    "attend_token",
)
BY_HAND = ("attend_token", "attend_rows", "score_rows", "select_rows")  # in Gluon
FEW_SPILLS = 128  # bytes of stack of those whose registers all hold something: 8 to 88 were seen
SHARED = 232448  # bytes of shared memory that a program of this GPU may have
failed: list[str] = []


def compile_one(kernel: NewKernel) -> None:
    """What is wrong with a kernel is noted, its time printed."""
    start, name = time.perf_counter(), kernel.name
    try:
        compiled = kernel.compile()
        most = 0 if name in NO_SPILLS else FEW_SPILLS if name in BY_HAND else None
        if most is not None and (spilled := count_spilled(compiled.asm["cubin"])) > most:
            failed.append(f"{name}: registers spill, {spilled} bytes of stack")
        if name in BY_HAND and (remarks := find_remarks(compiled.asm["ptx"])):
            failed.append(f"{name}: {remarks[0]}")
        if compiled.metadata.shared > SHARED:
            failed.append(f"{name}: {compiled.metadata.shared} bytes of shared memory, of {SHARED}")
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        failed.append(f"{name}: {str(cause)[:400]}")
    print(f"{name:24} {time.perf_counter() - start:6.2f} s")


def attend(heads: int, context: int) -> None:
    """Attention of one rank that has so many heads."""
    from saccade.kernels.attention.dense import dense_attention
    from saccade.kernels.attention.sparse_decode import attend_values

    w_uv = torch.empty(heads, 128, 512, dtype=torch.bfloat16)
    table = torch.ones(1, context // 64, dtype=torch.int64)
    for tokens, latent in product((1, 32), make_latents(128)):
        q, one = torch.empty(tokens, heads, 576), torch.zeros(tokens, dtype=torch.int64)
        if tokens == 1:
            attend_values(q, latent, table, one, torch.zeros(1, 2048, dtype=torch.int32), 0.1, w_uv)
        else:
            dense_attention(q, latent, table, one, one, 0.1, 512)


def make_latents(rows: int) -> list[Any]:
    """Pools of DeepSeek's latents: in BF16, and in FP8."""
    from saccade.kernels.types import Latents

    numbers, codes, rope = torch.empty(rows, 576), torch.empty(rows, 512), torch.empty(rows, 64)
    coded = Latents(codes.to(torch.float8_e4m3fn), rope.bfloat16(), torch.empty(rows))
    return [Latents(numbers.bfloat16()), coded]


def recur(heads: int, dim: int) -> None:
    """A recurrent layer of one rank that has so many heads: one token of one request, and a prompt beside others."""
    from saccade.kernels import reference
    from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights
    from saccade.kernels.recurrent.recur import run_recurrence
    from saccade.kernels.recurrent.tokens import Where
    from saccade.kernels.types import Matrix, Norm

    n = heads * dim
    delta = DeltaWeights(torch.empty(3 * n, 4), torch.empty(heads), torch.empty(n), -5.0, heads, dim)
    low = Matrix(torch.empty(n, dim, dtype=torch.bfloat16))
    shapes = (heads, dim, dim), (heads,), (9, 4 * n + heads)
    state = DeltaState(*(torch.empty(1, *shape) for shape in shapes))
    for tokens, requests in ((1, 1), (512, 1)):
        inputs = torch.empty(tokens, 3 * n + heads + 2 * dim).split([3 * n, heads, dim, dim], dim=1)
        where = Where(*(torch.zeros(size, dtype=torch.int64) for size in (requests, tokens, requests + 1)))
        norm = Norm(torch.empty(dim), 1e-5)
        run_recurrence(*inputs, low, low, delta, norm, state, where, multiply=reference.linear)


def pass_streams(hidden: int, streams: int) -> None:
    """Residual streams of few tokens and of a prompt, behind the first block and behind another."""
    from saccade.kernels.streams import Unwritten, merge_streams, read_streams, write_streams
    from saccade.kernels.types import Norm, StreamMixer

    rows, norm = streams * (2 + streams), Norm(torch.empty(hidden), 1e-5)
    fn = torch.empty(rows, streams * hidden, dtype=torch.bfloat16)
    mixer = StreamMixer(fn, torch.empty(rows), torch.empty(3), streams, 20, 1e-6, 1e-5)
    for tokens in (1, 8, 2048):
        values, sums = write_streams(torch.empty(tokens, hidden), mixer)
        _, mix = read_streams(values, sums, mixer, norm)
        unwritten = Unwritten(values, torch.empty(tokens, hidden), mix, mixer)
        write_streams(unwritten, mixer)
        merge_streams(unwritten, norm)


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def count_spilled(cubin: bytes) -> int:
    """Bytes of a thread's stack."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, check=True).stdout
    return max(map(int, re.findall(rb"STACK:(\d+)", told)))


def find_remarks(ptx: str) -> list[str]:
    """Why ptxas makes products wait for one another, which it tells of in remarks alone."""
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        asked = [get_ptxas(90).path, "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
    return [line for line in told.splitlines() if "wgmma" in line]


def prompt(tokens: int, context: int) -> None:
    """What prompts have beside other steps: masked attention, inputs of products and scores that are rounded,
    selections by hand; and FP8 experts that have few pairs."""
    from saccade.kernels.activations import prepare_activations, write_activations
    from saccade.kernels.attention.masked import masked_attention
    from saccade.kernels.indexer.prompt_logits import score_prompt
    from saccade.kernels.indexer.queries import write_index_queries
    from saccade.kernels.indexer.select_hopper import select_by_hand
    from saccade.kernels.linear.gemm import find_formats, run_gemm
    from saccade.kernels.moe.few_pairs import add_few_pairs
    from saccade.kernels.moe.grouped_gemm import add_experts, find_expert_formats
    from saccade.kernels.types import IndexKeys, Matrix, Mlp, Rotation

    def blocks(*shape: int) -> Matrix:
        scale = torch.empty(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        return Matrix(torch.empty(shape, dtype=torch.float8_e4m3fn), scale)

    table, one = torch.ones(1, context // 64, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
    rows, turn = 64 * (1 + context // 64), Rotation(torch.empty(tokens, 32), torch.empty(tokens, 32))
    q = torch.empty(tokens, 16, 192)
    selection = torch.zeros(tokens, 2048, dtype=torch.int32)
    w_uk, w_uv = torch.empty(2, 16, 128, 512, dtype=torch.bfloat16)
    w, (up, down) = blocks(2112, 7168), (blocks(16, 512, 7168), blocks(16, 7168, 256))
    chosen = torch.zeros(tokens, 8, dtype=torch.int64), torch.empty(tokens, 8)
    for activations, latent in product(("exact", "bf16"), make_latents(rows)):
        masked_attention(q, latent, table, table[:, 0], one, one, selection, w_uk, w_uv, turn, 0.1, activations)
    forms = [f for a in ("bf16", "fp8") for f in (find_formats(w, a), find_expert_formats(up, down, a))]
    x = prepare_activations(torch.empty(tokens, 7168), *forms)
    for activations in ("bf16", "fp8"):
        run_gemm(x, w, activations)
    add_experts(x, torch.empty(tokens, 7168), *chosen, up, down, activations="fp8")
    few, weights = torch.zeros(8, 8, dtype=torch.int64), torch.empty(8, 8)
    own = Mlp(Matrix(up.data[0], up.scale[0]), Matrix(down.data[0], down.scale[0]))
    add_few_pairs(write_activations(torch.empty(8, 7168), fp16=True).fp16, None, few, weights, up, down, shared=own)
    keys = IndexKeys(torch.empty(rows, 128, dtype=torch.float8_e4m3fn), torch.empty(rows))
    weights = torch.empty(tokens, 64)
    index = write_index_queries(torch.empty(tokens, 64, 128), weights, turn, False, 1.0, keys.data.dtype)
    score_prompt(index, keys, table, one, one)
    for size in (8192, 40960):  # at once, and in chunks
        select_by_hand(torch.empty(tokens, size), one, 2048)


def draw(rows: int, vocab: int) -> None:
    """Tokens of sampled rows."""
    from saccade.kernels.draw import draw_tokens

    draw_tokens(torch.zeros(rows, vocab), torch.ones(6, rows, dtype=torch.float64))


def main(steps: list[str]) -> None:
    """Each step: its kind, its tokens, its context, the formats of index keys and of latents; or heads and what they
    have."""
    torch.set_default_device(META)
    found = note_launches(90)
    for words in steps:
        kind, tokens, context, index_cache, latent_cache = [*words.split(), "bf16", "bf16"][:5]
        before = len(found)
        if kind in SINGLE:
            SINGLE[kind](int(tokens), int(context))
        else:
            step(kind, int(tokens), int(context), index_cache, latent_cache)
        print(words)
        for kernel in found[before:]:
            compile_one(kernel)
        print(f"{len(found) - before} kernels compiled, {len(failed)} failed")
    for text in failed:
        print("FAILED", text)
    sys.exit(bool(failed))


# Kernels alone, and the two numbers they are told.
SINGLE = {"attend": attend, "recur": recur, "prompt": prompt, "streams": pass_streams, "draw": draw}


def step(kind: str, tokens: int, context: int, index_cache: str, latent_cache: str) -> None:
    """Of DeepSeek-V3.2, or of the family in front of the kind: "flash-decode"."""
    from dataclasses import replace

    from saccade.api.loading.machine import make_drafter
    from saccade.bench.shapes import find_shape
    from saccade.bench.synthetic import plan_weights
    from saccade.checkpoint.read import TORCH_DTYPES
    from saccade.engine.buffers import StepInputs
    from saccade.engine.pages import allocate_cache
    from saccade.engine.sample import GREEDY, Row, list_columns
    from saccade.engine.speculate import Ask, StepKind, draft_and_verify, fill_columns
    from saccade.kernels import PAGE
    from saccade.kernels.embed import advance
    from saccade.models.registry import fetch_place, find_family
    from saccade.ops.step import Batch
    from saccade.weights.weights import Weights

    family_name, _, kind = kind.rpartition("-")
    shape = find_shape("glm5-next-rank-of-8" if family_name == "flash" else "v32-rank-of-8", 4, with_flash=True)
    config = replace(shape.config, n_routed_experts=16, vocab_size=4096)
    family, is_draft = find_family(config.model_type), kind == "draft"
    plan = plan_weights(config, mtp=is_draft)
    tensors = {s.name: torch.empty(s.shape, dtype=TORCH_DTYPES[s.dtype]) for s in plan.stored.values()}
    model = fetch_place(family.model)(config, Weights(tensors, kept=plan.stored), fetch_place(str(family.gpu))())
    model.layers = model.layers[3 if family_name else 2 :]  # a dense and a sparse one; of Flash one that attends
    pages = context // PAGE
    requests = 1 if kind in ("prefill", "draft") else tokens
    rows = torch.arange(tokens)
    batch = Batch(
        tokens=torch.zeros_like(rows), positions=context - tokens + rows, slots=PAGE + rows,
        request=rows % requests, page_table=torch.ones(requests, pages, dtype=torch.int64),
        seq_lens=torch.full((requests,), context), query_start=torch.arange(requests + 1), logit_rows=rows,
        state_slots=torch.ones(requests, dtype=torch.int64),
    )  # fmt: skip
    pages_of = {"mtp": is_draft, "index_cache": index_cache, "latent_cache": latent_cache, "requests": 1}
    cache = allocate_cache(config, 4 + tokens // PAGE, "auto", META, **pages_of)
    with torch.inference_mode():
        if kind == "prefill":
            model.logits(model.forward(batch, cache)[:1])
        elif is_draft:  # all but one of a request's tokens are drafts
            asks = [Ask([Row()] * tokens, [0] * (tokens - 1), [0] * tokens, ())]
            with torch.device("cpu"):
                flat, wants = fill_columns(asks, batch, tokens - 1), list_columns([], tokens)
            inputs, kind = StepInputs(batch, wants.to(META)), StepKind(tokens - 1, GREEDY)
            draft_and_verify(make_drafter(model), inputs, cache, flat.to(META), kind)
        else:
            logits = model.find_logits(batch, cache)
            advance(logits, *[torch.zeros_like(rows) for _ in range(5)], batch.page_table)


if __name__ == "__main__":
    main(sys.argv[1:])
