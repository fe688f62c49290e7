"""The bundled checkpoint on a CUDA device, through the product's own path, against the CPU."""

import ctypes
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from safetensors.torch import load_file, save_file

from saccade import LLM, NumericsError, SamplingParams
from saccade.bench.rig import build_rig
from saccade.bench.steps.eager import one_request, shuffle_pages
from saccade.checkpoint.open import bundled_path, open_model
from saccade.engine.pages import allocate_cache
from saccade.eval.evaluate import evaluate
from saccade.eval.show import show_report
from saccade.eval.tasks import draw_test
from saccade.kernels import carveout
from saccade.models.dsa.begin_step import begin_step
from saccade.ops.gpu import Gpu
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.plan import make_plan
from saccade.weights.loader import load
from tools.gpu_parity.compare import judge
from tools.gpu_parity.measure import draw_prompts, measure, measure_drafts

PROMPTS = [draw_test("words", 0).prompt, *(draw_test(task, 0, 512).prompt for task in ("recall", "story"))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_bundled_checkpoint_gives_the_greedy_tokens_of_the_cpu(dtype: str) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=48)
    cpu, gpu = (LLM(device=device, dtype=dtype, activations="exact") for device in ("cpu", "cuda"))
    expected, found = (llm.generate(PROMPTS, greedy) for llm in (cpu, gpu))
    alike = [a.token_ids == b.token_ids for a, b in zip(expected, found, strict=True)]
    tokens = cpu.encode(PROMPTS[2])
    difference = (torch.tensor(cpu.score(tokens)) - torch.tensor(gpu.score(tokens))).abs()
    print(f"{dtype}: same greedy tokens {alike}; log-probabilities differ by at most {difference.max():.1e}")
    if dtype == "float32":
        assert all(alike) and difference.max() < 1e-4
    else:  # a near tie in the selection may fall the other way
        assert difference.median() < 5e-3


@pytest.mark.gpu
def test_held_out_problems_are_answered_at_the_full_context() -> None:
    report = evaluate(None, 100, 4096, probed=4, device="cuda")
    print(show_report(report))
    shares = {m.task: m.share for m in report.matches}
    assert shares["words"] >= 0.95 and shares["recall"] >= 0.95 and shares["story"] >= 0.8
    assert all(d.share >= 0.6 for d in report.drafts)
    fp32, fused = report.arrangements[:2]
    assert fused.exact == fp32.exact and max(m or 0.0 for m in fused.missed_mass) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("is_late", [False, True])
def test_parameters_are_those_of_the_cpu_bit_for_bit(dtype: str, is_late: bool) -> None:
    """One thread reads, so that each pinned buffer is used again; late copies wait behind a second of other work."""
    plan = make_plan(*open_model(bundled_path()), dtype=dtype)
    expected = load(plan).held
    load(plan, "cuda", threads=1)  # starts CUDA
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    if is_late:
        torch.cuda._sleep(1_500_000_000)  # type: ignore[no-untyped-call]
    found = load(plan, "cuda", threads=1).held
    seconds = time.perf_counter() - start
    extra = torch.cuda.max_memory_allocated() - before - plan.device_bytes
    speed = sum(file.size for file in plan.index.files) / seconds / 1e9
    print(f"{dtype}, late {is_late}: {speed:.2f} GB/s, {seconds:.3f} s, {extra / 2**20:.1f} MiB beside the parameters")
    assert found.keys() == expected.keys() and all(tensor.is_cuda for tensor in found.values())
    wrong = [name for name, t in found.items() if not t.cpu().view(torch.uint8).equal(expected[name].view(torch.uint8))]
    assert not wrong
    assert extra <= 72 << 20  # of a thread: two pieces of 4 MiB, and one as f32 numbers a few times


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_an_fp8_index_cache_gives_the_log_probabilities_of_the_cpu(dtype: str) -> None:
    exact = {"dtype": dtype, "index_cache": "fp8", "activations": "exact"}
    cpu, gpu = (LLM(device=device, **exact) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    tokens = cpu.encode(PROMPTS[2])
    difference = (torch.tensor(cpu.score(tokens)) - torch.tensor(gpu.score(tokens))).abs()
    print(
        f"{dtype}, FP8 index cache: log-probabilities differ by {difference.median():.1e}, at most {difference.max():.1e}"
    )
    # a last bit that rounds a key to the other side may change what is selected, so the largest may be anything
    assert difference.median() < (1e-4 if dtype == "float32" else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("index_cache", ["bf16", "fp8"])
def test_the_fast_kernels_are_the_reference_s(index_cache: str) -> None:
    """`python -m tools.gpu_parity` does the same with 50 prompts."""
    reference, fast = (
        LLM(device="cuda", index_cache=index_cache, kernels=how, prefix_cache=False, activations="exact")
        for how in ("reference", "fast")
    )  # repeated runs are compared bit for bit: what a cache has found was computed in other chunks
    prompts = draw_prompts(reference, 7, 2048)
    result = measure(reference, fast, prompts, 24)
    drafts = measure_drafts(reference, fast, prompts[:2])
    print(index_cache, result, drafts)
    assert all(judge(result).values()) and drafts["alike"] > 0.99


@triton.jit
def _touch(x):
    tl.store(x, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [True, False])
def test_kernels_that_overlap_ask_for_the_same_carveout(overlaps: bool) -> None:
    kernel, found = _touch[1,](torch.zeros(1, device="cuda"), launch_pdl=overlaps), ctypes.c_int()
    asked = ctypes.c_void_p(kernel.function)
    assert ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(ctypes.byref(found), carveout.ATTRIBUTE, asked) == 0
    assert found.value == (carveout.PERCENT if overlaps else -1)


@pytest.mark.gpu
def test_layers_of_many_tokens_are_the_model_s() -> None:
    """A dense and a sparse one at the sizes of one rank of eight; a token whose near tie tips over may be anything."""
    device, tokens = torch.device("cuda"), 2500
    rig = build_rig("v32-rank-of-8", 4, device)
    config, model = rig.shape.config, rig.model
    table = shuffle_pages(1, 40, device)
    batch = one_request(torch.arange(tokens, device=device) % config.vocab_size, 0, table)
    cache = allocate_cache(config, 41, rig.plan.dtype, device, mtp=False)
    # The reference reads the rows that the kernels have cached, and writes its own to page 0: where a number is rounded
    # to BF16, the two may fall to different sides. With a cache of its own a dense layer was 2.8e-5 off on an H200.
    reading = replace(batch, slots=torch.full_like(batch.slots, -1))
    embedding = model.embed_tokens, model.rotary, model.norm
    with torch.inference_mode():
        for layer in model.layers[2:]:
            results = []
            for ops, its in ((Gpu(), batch), (Reference(), reading)):
                x, step = begin_step(ops, its, cache, its.tokens, *embedding, config.index_topk)
                after, selection = layer(ops, Residual(x.value, layer.input_norm), step, None, model.norm)
                results.append((after.value, selection))
            (found, selected), (expected, chosen), x = *results, x.value
            off = (found - expected).norm(dim=1) / (expected - x).norm(dim=1)
            same = (selected == chosen).all(1).float().mean()
            few = off.quantile(0.99)
            print(f"off {off.median():.1e}, 99 of 100 {few:.1e}, largest {off.max():.1e}; same {same:.2%}")
            assert off.median() < 2e-5 and few < 3e-4 and same > 0.99


def spoil(root: Path, name: str, place: int | tuple[int, ...]) -> Path:
    """A copy of the bundled model with one NaN."""
    shutil.copytree(bundled_path(), root)
    file = root / json.loads((root / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name][place] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return root


A = "model.layers.2.self_attn."
NAN_IN = {
    "model.norm.weight": 0, "lm_head.weight": (17, 3), A + "indexer.weights_proj.weight": (1, 3),
    A + "indexer.k_norm.weight": 3, A + "indexer.wk.weight_scale_inv": (0, 0), A + "kv_a_layernorm.weight": 3,
    "model.layers.2.mlp.gate.e_score_correction_bias": 2,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("speculate", "index_cache"), [(0, "bf16"), (3, "fp8")])
@pytest.mark.parametrize("name", NAN_IN)
def test_what_is_not_finite_ends_requests_in_graphs_too(
    tmp_path: Path, name: str, speculate: int, index_cache: str
) -> None:
    root = spoil(tmp_path / "m", name, NAN_IN[name])
    llm = LLM(root, device="cuda", kernels="fast", speculate=speculate, index_cache=index_cache)
    tokens = llm.encode(PROMPTS[1])
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "logprobs": 2}):
        for _ in range(3):  # run, recorded, replayed
            with pytest.raises(NumericsError, match="of parameter .* NaN or infinite"):
                llm.generate(tokens, SamplingParams(max_tokens=5, **options))  # type: ignore[arg-type]
    with pytest.raises(NumericsError):
        llm.score(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [0, 3])
def test_a_request_that_is_not_finite_spoils_no_other_in_graphs(tmp_path: Path, speculate: int) -> None:
    greedy, good = SamplingParams(temperature=0.0, max_tokens=40), LLM(device="cuda", kernels="fast")
    ids = [good.encode(prompt) for prompt in PROMPTS]
    alone = [good.generate(tokens, greedy)[0].token_ids for tokens in ids]
    bad = next(t for t in range(250, 0, -1) if all(t not in seen for seen in (*ids, *alone)))
    root = spoil(tmp_path / "m", "model.embed_tokens.weight", (bad, 3))
    llm = LLM(root, device="cuda", kernels="fast", speculate=speculate)
    for place in (40, 40, 40, len(ids[1])):  # again: in the pages that it has left
        with pytest.raises(NumericsError) as caught:
            llm.generate([ids[0], [*ids[1][:place], bad, *ids[1][place:]], *ids[1:]], greedy)
        first, failed, *others = caught.value.completions
        assert [made.token_ids for made in (first, *others)] == alone and not failed.token_ids


@pytest.mark.gpu
def test_pushed_weights_run_in_the_graphs_of_the_old_ones() -> None:
    """Graphs hold addresses, and a push keeps them."""
    greedy = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0)
    plan = make_plan(*open_model(bundled_path()))
    stored: dict[str, torch.Tensor] = {}
    for shard in plan.index.files:
        stored |= load_file(bundled_path() / shard.name)
    llm = LLM(device="cuda", kernels="fast")
    before = llm.generate(PROMPTS[0], greedy)
    llm.generate(PROMPTS[0], greedy)  # captured
    name = "model.norm.weight"
    for scale in (0.5, 1.0):
        announced = {n: (e.dtype, e.shape) for n, e in plan.index.entries.items()}
        with llm.push(announced) as push:
            for n, tensor in stored.items():
                push.feed(n, tensor * scale if n == name else tensor)
            push.finish()
        after = llm.generate(PROMPTS[0], greedy)
        assert (after[0].logprobs == before[0].logprobs) == (scale == 1.0)
