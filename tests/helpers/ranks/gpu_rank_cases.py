"""What ranks on GPUs do in tests: a process each, started by `run_gpu_ranks`, over one GPU or several.

`python gpu_rank_cases.py CASE OPTIONS` runs one rank of a case; its place is in torchrun's variables.
"""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

TIMEOUT = 420.0  # seconds of a case: kernels compile in it
HIDDEN = 7168
PAGE_ROWS = 64


def run_gpu_ranks(case: str, tp: int, devices: int, **options: Any) -> list[dict[str, Any]]:
    """What `case` returns on each of `tp` ranks, spread over `devices` GPUs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running = []
    for rank in range(tp):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(tp), "MASTER_PORT": str(port)}
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RANK_DEVICES": str(devices)}
        env["NCCL_NVLS_ENABLE"] = "0"
        command = [sys.executable, __file__, case, json.dumps(options)]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        end = time.monotonic() + TIMEOUT
        texts = [process.communicate(timeout=max(1.0, end - time.monotonic()))[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    codes = [process.returncode for process in running]
    assert codes == [0] * tp, f"{case}: ranks ended with {codes}"
    return [json.loads(text.strip().splitlines()[-1]) for text in texts]


def join() -> Any:
    from torch._C._distributed_c10d import TCPStore

    from saccade.models.parameters import Layout
    from saccade.parallel.device import join_devices

    rank, tp, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = TCPStore("127.0.0.1", port, tp, rank == 0, timedelta(minutes=5), wait_for_workers=False)
    ep = int(json.loads(sys.argv[2]).get("ep", 1))
    device = torch.device("cuda", rank % int(os.environ["RANK_DEVICES"]))
    return join_devices(store, Layout(tp, ep, rank), device, timedelta(minutes=6))


def push_rounds(ranks: Any, graphs: int, sums: int, replays: int) -> dict[str, Any]:
    """Sums of random sizes and kinds, with random delays of each rank, in graphs: how many numbers differ from the sum
    in rank order, and a digest of all of them."""
    from saccade.kernels.collective.push import push_columns, push_sum
    from saccade.kernels.residual import get_values
    from saccade.kernels.types import Norm

    tp, rank, peers = ranks.layout.tp, ranks.layout.rank, ranks.memory.peers
    dice, delays = random.Random(7), random.Random(rank)
    # Numbers of very different sizes: every order of summands has another sum.
    bases = [
        torch.randn(64, HIDDEN, generator=torch.Generator("cuda").manual_seed(r), device="cuda") for r in range(tp)
    ]
    bases = [base * 10.0 ** torch.randint(-3, 4, (64, 1), device="cuda", generator=torch.Generator("cuda").manual_seed(r))
             for r, base in enumerate(bases)]  # fmt: skip
    before = torch.randn(64, HIDDEN, generator=torch.Generator("cuda").manual_seed(99), device="cuda")
    norm = Norm(torch.rand(HIDDEN, generator=torch.Generator("cuda").manual_seed(98), device="cuda") + 0.5, 1e-6)
    scale, wrong, digest = torch.ones(1, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda"), None
    digest = torch.zeros((), dtype=torch.int64, device="cuda")

    def note(found: Tensor, expected: Tensor) -> None:
        wrong.add_((found != expected).sum())
        digest.mul_(31).add_(found.contiguous().view(torch.int32).sum(dtype=torch.int64))

    def one(rows: int, kind: str) -> None:
        parts = [base[:rows] * scale for base in bases]
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        if kind == "columns":
            note(push_columns(peers, parts[rank], HIDDEN * tp), torch.cat(parts, 1))
        elif kind == "norm":
            found = push_sum(peers, parts[rank], before[:rows], norm)
            note(get_values(found), before[:rows] + expected)
            note(found.scaled, (before[:rows] + expected) * norm.weight)  # type: ignore[union-attr]
        elif kind == "residual":
            note(get_values(push_sum(peers, parts[rank], before[:rows])), before[:rows] + expected)
        else:
            note(get_values(push_sum(peers, parts[rank], steps=2)), expected)

    captured = []
    for _ in range(graphs):
        plan = [
            (dice.randint(1, 64), dice.choice(("residual", "residual", "steps", "columns", "norm")))
            for _ in range(sums)
        ]
        plan = [
            (min(rows, 2) if kind == "norm" else min(rows, 16) if kind == "columns" else rows, kind)
            for rows, kind in plan
        ]
        waits = [delays.randint(0, 200_000) for _ in plan]
        for rows, kind in dict.fromkeys(plan):
            one(rows, kind)  # compiles; all ranks alike
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for (rows, kind), cycles in zip(plan, waits, strict=True):
                torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
                one(rows, kind)
        captured.append(graph)
    start = time.perf_counter()
    for k in range(replays):
        for graph in captured:
            scale.fill_(1.0 + 0.37 * k)
            graph.replay()
            if delays.random() < 0.1:
                torch.cuda.synchronize()
                time.sleep(delays.random() * 0.01)
    torch.cuda.synchronize()
    ranks.check()
    seconds = time.perf_counter() - start
    return {"wrong": int(wrong), "digest": int(digest), "rounds": graphs * sums * replays, "seconds": seconds}


def copy_pages(pool: Tensor, to: Tensor, from_: Tensor, at: Tensor) -> None:
    to.view(-1, PAGE_ROWS, to.shape[-1])[at] = pool.view(-1, PAGE_ROWS, pool.shape[-1])[from_]


def compare_steps(ranks: Any, ep: int = 1) -> dict[str, Any]:
    """A DeepSeek-V3.2 of four layers (32 experts) on these ranks against one rank with the same weights: differences of
    log-probabilities in a prefill, in decode steps, of the MTP layer; and whether all ranks have the same bits."""
    from rank_shares import share_weights

    from saccade.api.loading.machine import make_drafter
    from saccade.bench.shapes import find_shape
    from saccade.bench.steps.drafting import DraftSteps
    from saccade.bench.steps.eager import one_request, random_tokens, shuffle_pages
    from saccade.bench.synthetic import make_weights, plan_weights
    from saccade.engine.graphs import DecodeGraph
    from saccade.engine.pages import allocate_cache
    from saccade.models.dsa.transformer import Transformer
    from saccade.ops.gpu import Gpu

    device = torch.device("cuda", torch.cuda.current_device())
    config = replace(find_shape("v32", 4).config, n_routed_experts=32, vocab_size=8192, index_topk=256)
    plans = [plan_weights(config, mtp=True, layout=layout) for layout in (type(ranks.layout)(), ranks.layout)]
    whole = make_weights(plans[0], device, 5)
    shared = share_weights(plans[0], whole.held, plans[1])
    models = [Transformer(config, whole, Gpu()), Transformer(config, shared, Gpu(ranks=ranks))]
    context, pages, result = 600, 10, {}
    digest = hashlib.sha256()

    def note(name: str, one: Tensor, many: Tensor, alike: Tensor | None = None) -> None:
        digest.update(many.float().cpu().numpy().tobytes())
        apart = (one.log_softmax(-1) - many.log_softmax(-1)).abs().amax(-1)
        alike = torch.ones_like(apart, dtype=torch.bool) if alike is None else alike
        result[name] = {
            "alike": float(alike.float().mean()), "median": float(apart[alike].median()),
            "most": float(apart[alike].quantile(0.98)), "max": float(apart[alike].max()),
        }  # fmt: skip

    with torch.inference_mode():
        table, tokens = shuffle_pages(1, pages, device), random_tokens(config.vocab_size, context, device)
        batch, states, seen, caches = one_request(tokens, 0, table), [], [], []
        for model in models:
            cache, chosen = allocate_cache(config, pages + 1, "auto", device, mtp=True), list[Tensor]()
            states.append(model.forward(batch, cache, chosen))
            seen.append(torch.stack(chosen))
            caches.append(cache)
        alike = (seen[0] == seen[1]).all(0).all(-1)
        note("prefill", *(m.logits(h) for m, h in zip(models, states, strict=True)), alike)
        drafted = []
        for model, hidden, cache in zip(models, states, caches, strict=True):
            assert model.mtp is not None
            out, _ = model.mtp.forward(batch, tokens.roll(-1), hidden, cache)
            drafted.append(model.mtp.logits(out))
        note("draft", *drafted, alike)
        for requests in (1, 2, 8, 32):
            many = shuffle_pages(requests, pages, device)
            logits = []
            for model, cache in zip(models, caches, strict=True):
                own = allocate_cache(config, requests * pages + 1, "auto", device, mtp=True)
                for i in range(requests):
                    for pools, mine in ((cache.latent, own.latent), (cache.index_keys, own.index_keys)):
                        for pool, to in zip(pools, mine, strict=True):
                            if pool is not None:
                                copy_pages(pool.data, to.data, table[0], many[i])
                steps = DecodeGraph(model, own, requests, pages, device)
                rows = []
                for step in range(3):
                    steps.load(
                        tokens[step : step + requests].clone(),
                        torch.full((requests,), context + step, device=device),
                        many,
                    )
                    steps.run()
                    assert steps.logits is not None
                    rows.append(steps.logits.clone())
                logits.append(torch.cat(rows))
            note(f"decode {requests}", *logits)
        drafting = DraftSteps(make_drafter(models[1]), caches[1], table, context, 2, config.vocab_size)
        drafting.run()  # what a graph gives is there when it has been replayed
        first = drafting.tokens.clone()
        drafting.run()
        result["drafts replayed alike"] = {"alike": float((first == drafting.tokens).float().mean())}
        digest.update(drafting.tokens.cpu().numpy().tobytes())
    ranks.check()
    return {**result, "digest": digest.hexdigest()}


def miss_one(ranks: Any) -> dict[str, Any]:
    """The last rank stays away from one sum."""
    from saccade.errors import RankError

    part, start = torch.ones(1, HIDDEN, device="cuda"), time.perf_counter()
    ranks.add_up(part)
    torch.cuda.synchronize()
    if ranks.layout.rank < ranks.layout.tp - 1:
        for _ in range(3):  # later sums wait for nobody
            ranks.add_up(part)
    torch.cuda.synchronize()
    text = ""
    try:
        ranks.check()
    except RankError as error:
        text = str(error)
    return {"error": text, "seconds": time.perf_counter() - start}


def repeat_steps(ranks: Any, layers: int, steps: int = 1000, requests: int = 4) -> dict[str, Any]:
    """Decode steps of a DeepSeek-V3.2 of so many layers on synthetic weights: a digest of all logits and tokens."""
    from saccade.bench.rig import build_rig
    from saccade.bench.steps.eager import random_tokens, shuffle_pages
    from saccade.bench.steps.fill import fill_caches
    from saccade.engine.pages import allocate_cache

    device, context = torch.device("cuda", torch.cuda.current_device()), 4096
    rig = build_rig("v32", layers, device, ranks=ranks)
    pages = context // PAGE_ROWS
    with torch.inference_mode():
        cache = allocate_cache(rig.shape.config, requests * pages + 1, "auto", device, mtp=False)
        table = shuffle_pages(requests, pages, device)
        fill_caches(cache, table, context, None)
        run: Any = rig.make_steps("packed", cache, requests, pages)
        first = torch.full((requests,), context - steps - 1, device=device)
        run.load(random_tokens(rig.shape.config.vocab_size, requests, device), first, table)
        digest, start = torch.zeros((), dtype=torch.int64, device=device), time.perf_counter()
        for _ in range(steps):
            run.run()
            digest = digest * 31 + run.logits.view(torch.int32).sum(dtype=torch.int64) + run.tokens.sum()
        torch.cuda.synchronize()
    ranks.check()
    return {"digest": int(digest), "steps": steps, "ms": 1e3 * (time.perf_counter() - start) / steps}


if __name__ == "__main__":
    if sys.argv[1] == "start":  # by hand: `start TP LAYERS`
        tp, layers = int(sys.argv[2]), int(sys.argv[3])
        answers = run_gpu_ranks("repeat_steps", tp, torch.cuda.device_count(), layers=layers)
        digests = {answer["digest"] for answer in answers}
        print(f"{tp} ranks, {layers} layers, {answers[0]['steps']} steps, {answers[0]['ms']:.3f} ms each:"
              f" {'the same bits on all ranks' if len(digests) == 1 else f'DIFFERENT BITS: {digests}'}")  # fmt: skip
        sys.exit(len(digests) > 1)
    gpus = join()
    found = globals()[sys.argv[1]](gpus, **json.loads(sys.argv[2]))
    torch.cuda.synchronize()
    gpus.collect("")
    print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)
