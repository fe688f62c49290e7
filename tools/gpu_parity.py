"""The fast kernels against the reference on one GPU: same checkpoint, same storage, same precision of the cache.

`python -m tools.gpu_parity` asks held-out problems of up to 4,096 tokens and compares (a) log-probabilities where
the selection is the same; (b) what the fast path did not select, by the reference's attention on it; (c) greedy
text; (d) runs with each other, bit for bit. Decodes have 1 to 16 requests at a time. Next: saccade/fast.py.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.batch import Run
from saccade.bench.record import describe_run
from saccade.engine import LOGIT_ROWS, on
from saccade.eval.drafts import find_accepted
from saccade.eval.looked import spying
from saccade.eval.probe import _is_in
from saccade.eval.tasks import TASKS, draw_test
from saccade.kernels import PAGE
from saccade.llm import LLM, Completion
from saccade.params import SamplingParams

GROUPS = (1, 2, 1, 3, 1, 5, 1, 7, 1, 11, 1, 16)  # prompts that are decoded together; 50 in all
LENGTHS = (0, 1024, 4030, 2048, 512, 4030)  # tokens of a long text, together with 64 of an answer
TAIL = 5  # the last tokens of a prompt are a step of their own: few tokens of one request
BARS = {"log_prob": 2e-2, "missed_mass": 1e-3, "gap": 1e-2, "texts": 0.02}


class Forced(NamedTuple):
    """What a model says of each token of a text given those before it."""

    logits: Tensor  # f32 [n, vocab]
    log_probs: Tensor  # f32 [n - 1]
    selections: Tensor | None  # i32 [layers, n, K], ascending, -1 padded
    masses: Tensor | None  # f32 [layers, n, K]: attention over the selection, the mean over heads


@torch.inference_mode()
def force(llm: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int], looks: bool, weighs: bool) -> list[Forced]:
    """Run `texts` through the model that the idle engine runs: each up to `starts` in prefill chunks, then all side by
    side, a token of each a step, to the end of the shortest. looks: keep selections; weighs: attention too, by the
    reference's operations."""
    engine, pages = llm.engine, -(-max(map(len, texts)) // PAGE)
    owned = [range(1 + i * pages, 1 + (i + 1) * pages) for i in range(len(texts))]
    found: list[list[list[Tensor]]] = [[[], [], []] for _ in texts]  # of each text: logits, selections, masses

    def step(runs: Sequence[tuple[int, int, int]]) -> None:
        """(text, first, last) side by side."""
        rows = [Run(texts[i][a:b], a, owned[i], b - a) for i, a, b in runs]
        batch = engine.buffers.fill(rows)
        seen: list[Tensor] = []
        if spy is not None:
            spy.attention.clear()
        hidden = engine.model.forward(batch, engine.cache, seen if looks else None)
        logits = torch.cat([engine.model.logits(hidden[rows]) for rows in batch.logit_rows.split(LOGIT_ROWS)])
        row = 0
        for i, a, b in runs:
            here = slice(row, row + b - a)
            found[i][0].append(logits[here])
            if looks:
                found[i][1].append(torch.stack(seen)[:, here].clone())
            if spy is not None:
                found[i][2].append(torch.stack(spy.attention)[:, here].clone())
            row += b - a

    with on(llm.settings.device), spying(llm.model) if weighs else nullcontext() as spy:
        for i, start in enumerate(starts):
            edges = [*range(0, max(start - TAIL, 0), llm.settings.max_batch_tokens), max(start - TAIL, 0), start]
            for a, b in zip(edges, edges[1:], strict=False):
                if a < b:
                    step([(i, a, b)])
        for ahead in range(min(len(text) - start for text, start in zip(texts, starts, strict=True))):
            step([(i, start + ahead, start + ahead + 1) for i, start in enumerate(starts)])
    results = []
    for text, (logits, selections, masses) in zip(texts, found, strict=True):
        all_logits = torch.cat(logits)
        following = torch.tensor(text[1 : 1 + len(all_logits)], device=all_logits.device)
        log_probs = all_logits[: len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0]
        results.append(Forced(all_logits, log_probs, _join(selections), _join(masses)))
    return results


def _join(parts: Sequence[Tensor]) -> Tensor | None:
    """[layers, t, K] one after the other; K may differ while a context is short."""
    if not parts:
        return None
    width, fill = max(part.shape[2] for part in parts), -1 if parts[0].dtype == torch.int32 else 0
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2]), value=fill) for part in parts], 1)


class Comparison(NamedTuple):
    """One text, fast against reference."""

    log_prob: Tensor  # f32 [n - 1] absolute differences
    is_same: Tensor  # bool [n - 1] whether all layers of the token selected the same
    is_same_so_far: Tensor  # bool [n - 1] whether those of all tokens before it did as well
    missed: Tensor  # f64 [layers] summed over tokens that see more than is selected
    counted: int  # such tokens
    changed: Tensor  # i64 [layers] of them with another selection


def compare(expected: Forced, found: Forced, topk: int) -> Comparison:
    assert expected.selections is not None and found.selections is not None and expected.masses is not None
    missed, has_all = [], []
    for selection, theirs, mass in zip(expected.selections, found.selections, expected.masses, strict=True):
        has = _is_in(selection, theirs) | (selection < 0)
        has_all.append(has.all(1))
        missed.append((mass * ~has).sum(1).double())
    same = torch.stack(has_all)  # [layers, n]
    sparse = torch.arange(same.shape[1], device=same.device) >= topk
    is_same = same.all(0)[: len(expected.log_probs)]
    return Comparison(
        (found.log_probs - expected.log_probs).abs().cpu(),
        is_same.cpu(),
        is_same.cummin(0).values.cpu(),
        torch.stack(missed)[:, sparse].sum(1).cpu(),
        int(sparse.sum()),
        (~same[:, sparse]).sum(1).cpu(),
    )


def draw_prompts(llm: LLM, count: int, longest: int) -> list[list[int]]:
    """Prompts of at most `longest` tokens: short ones, and long texts of several lengths."""
    found = []
    for i in range(count):
        length = min(LENGTHS[i % len(LENGTHS)], longest)
        task = TASKS[1 + i // len(LENGTHS) % 2] if length else "words"
        found.append(llm.encode(draw_test(task, i, length).prompt))
    return found


def cut_groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    first = i = 0
    while first < len(prompts):
        size = GROUPS[i % len(GROUPS)]
        yield list(prompts[first : first + size])
        first, i = first + size, i + 1


def differ(expected: Completion, found: Completion, end_ids: Sequence[int]) -> dict[str, Any] | None:
    """Where two greedy texts part, whether before the end of the answer, and how near the two candidates were."""
    assert expected.logprobs is not None
    both = zip(expected.token_ids, found.token_ids, strict=False)
    place = next((i for i, (a, b) in enumerate(both) if a != b), None)
    if place is None:
        return None
    top = dict(expected.logprobs[place].top)
    gap = top[expected.token_ids[place]] - top.get(found.token_ids[place], float("-inf"))
    is_within = not set(expected.token_ids[:place]) & set(end_ids)
    return {"place": place, "gap": gap, "is_within_answer": is_within}


def measure(reference: LLM, fast: LLM, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    """All numbers for one pair of models; `tokens` are generated for each prompt, past its end."""
    topk, layers = reference.config.index_topk, len(reference.model.layers)
    room = min(reference.settings.max_length, tokens + max(map(len, prompts)))
    sums = {way: [torch.zeros(layers, dtype=torch.float64) for _ in range(2)] for way in ("prefill", "decode")}
    counted = dict.fromkeys(sums, 0)
    pieces: dict[str, list[tuple[Comparison, int]]] = {way: [] for way in sums}
    texts: list[dict[str, Any] | None] = []
    repeats = {"logits": True, "captured": True, "texts": True}
    for number, group in enumerate(cut_groups(prompts)):
        few = min(tokens, room - max(map(len, group)))
        greedy = SamplingParams(max_tokens=few, temperature=0.0, ignore_eos=True, logprobs=20)
        expected, found, again = (llm.generate(group, greedy) for llm in (reference, fast, fast))
        repeats["texts"] &= [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in again]
        pairs = zip(expected, found, strict=True)
        texts += [differ(a, b, reference.config.eos_token_ids) for a, b in pairs]
        whole = [prompt + answer.token_ids[:-1] for prompt, answer in zip(group, expected, strict=True)]
        ends, starts = [len(text) for text in whole], [len(prompt) - 1 for prompt in group]
        for way, first in (("prefill", ends), ("decode", starts)):
            truth = force(reference, whole, first, looks=True, weighs=True)
            ours = force(fast, whole, first, looks=True, weighs=False)
            for begin, a, b in zip(starts, truth, ours, strict=True):
                piece = compare(a, b, topk)
                pieces[way].append((piece, begin))
                sums[way][0] += piece.missed
                sums[way][1] += piece.changed
                counted[way] += piece.counted
            if way == "decode" or number == 0:  # the second run captures each step's graph, the third replays it
                second, third = (force(fast, whole, first, looks=False, weighs=False) for _ in range(2))
                for a, b, c in zip(ours, second, third, strict=True):
                    repeats["captured"] &= a.logits.equal(b.logits)
                    repeats["logits"] &= b.logits.equal(c.logits)
    result: dict[str, Any] = {}
    for way, some in pieces.items():
        for part, cut in (("prompts", lambda b: slice(0, b)), ("answers", lambda b: slice(b, None))):
            log_prob = torch.cat([piece.log_prob[cut(b)] for piece, b in some])
            result[f"{way}, {part}"] = summarise(
                log_prob,
                torch.cat([piece.is_same[cut(b)] for piece, b in some]),
                torch.cat([piece.is_same_so_far[cut(b)] for piece, b in some]),
            )
        result[f"{way}, selection"] = {
            "tokens": counted[way],
            "missed_mass": (sums[way][0] / max(counted[way], 1)).tolist(),
            "other_selection": (sums[way][1] / max(counted[way], 1)).tolist(),
        }
    parted = [{"prompt": i, "tokens": len(prompts[i])} | d for i, d in enumerate(texts) if d is not None]
    result["greedy"] = {"texts": len(texts), "tokens": tokens, "parted": parted}
    result["repeats"] = repeats
    return result


def summarise(log_prob: Tensor, is_same: Tensor, is_same_so_far: Tensor) -> dict[str, Any]:
    def most(where: Tensor) -> float:
        return float(log_prob[where].max()) if where.any() else 0.0

    return {
        "tokens": len(log_prob),
        "same": int(is_same.sum()),
        "same_so_far": int(is_same_so_far.sum()),
        "largest_where_same": most(is_same),
        "over_bar_where_same": int((log_prob[is_same] > BARS["log_prob"]).sum()),
        "largest_where_same_so_far": most(is_same_so_far),
        "largest": float(log_prob.max()),
        "mean": float(log_prob.mean()),
        "p999": float(log_prob.quantile(0.999)),
    }


def judge(result: dict[str, Any]) -> dict[str, bool]:
    """Which bars hold."""
    parts = [result[f"{way}, {part}"] for way in ("prefill", "decode") for part in ("prompts", "answers")]
    masses = [max(result[f"{way}, selection"]["missed_mass"]) for way in ("prefill", "decode")]
    parted = [d for d in result["greedy"]["parted"] if d["is_within_answer"]]
    near = all(d["gap"] < BARS["gap"] for d in parted)
    return {
        "a: log-probabilities": all(part["largest_where_same"] <= BARS["log_prob"] for part in parts),
        "b: missed attention mass": max(masses) <= BARS["missed_mass"],
        "c: greedy text": near and len(parted) <= BARS["texts"] * result["greedy"]["texts"],
        "d: repeats itself": all(result["repeats"].values()),
    }


def measure_drafts(reference: LLM, fast: LLM, prompts: Sequence[list[int]]) -> dict[str, float]:
    """At how many places both MTP layers' drafts are right, or both wrong."""
    alike = []
    for prompt in prompts:
        s = reference.settings
        a, b = (find_accepted(llm.model, prompt, s.dtype, s.device, s.index_cache) for llm in (reference, fast))
        alike.append((a == b).float())
    return {"places": sum(map(len, alike)), "alike": float(torch.cat(alike).mean())}


def show(result: dict[str, Any]) -> Iterator[str]:
    for name, value in result.items():
        if name == "greedy":
            yield f"  greedy: {len(value['parted'])} of {value['texts']} texts of {value['tokens']} tokens part"
            yield from (f"    {d}" for d in value["parted"])
        elif isinstance(value, dict):
            yield f"  {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        else:
            yield f"  {name}: {value}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{v:.1e}" for v in value)
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the fast kernels with the reference on a GPU.")
    parser.add_argument("--model", default=None, help="a checkpoint; default: the bundled one")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="generated for each prompt")
    parser.add_argument("--longest", type=int, default=4030, help="tokens of a prompt")
    parser.add_argument("--index-cache", action="append", choices=("bf16", "fp8"), help="default: both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    asked = parser.parse_args()
    record = describe_run(torch.device(asked.device))
    record |= {"command": f"python -m tools.gpu_parity --prompts {asked.prompts} --tokens {asked.tokens}"}
    record |= {"model": asked.model or "bundled", "dtype": "auto", "bars": BARS}
    for index_cache in asked.index_cache or ("bf16", "fp8"):
        start = time.perf_counter()
        options = {"device": asked.device, "index_cache": index_cache}
        reference, fast = (LLM(asked.model, kernels=kernels, **options) for kernels in ("reference", "fast"))
        prompts = draw_prompts(reference, asked.prompts, asked.longest)
        result = measure(reference, fast, prompts, asked.tokens)
        if reference.model.mtp is not None:
            result["drafts"] = measure_drafts(reference, fast, prompts[:6])
        result["holds"] = judge(result)
        result["lengths"] = [len(prompt) for prompt in prompts]
        result["seconds"] = time.perf_counter() - start
        record[f"index_cache {index_cache}"] = result
        print(f"index cache {index_cache}, {record['device']}", *show(result), sep="\n", flush=True)
        del reference, fast
    asked.out.mkdir(parents=True, exist_ok=True)
    name = str(record["device"]).lower().replace("nvidia", "").split()[0]
    (asked.out / f"parity-{record['model'].split('/')[-1]}-{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
