"""The fast kernels against the reference on one GPU: same checkpoint, same storage, same precision of the cache.

`python -m tools.gpu_parity` asks held-out problems of up to 4,096 tokens and compares (a) log-probabilities where
the selection is the same; (b) what the fast path did not select, by the reference's attention on it; (c) greedy
text; (d) runs with each other, bit for bit. Decodes have 1 to 16 requests at a time. Next: saccade/fast.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.batch import Batch, Run
from saccade.bench.record import describe_run
from saccade.cache import Cache
from saccade.engine import LOGIT_ROWS, on
from saccade.eval.drafts import find_accepted
from saccade.eval.looked import spying
from saccade.eval.probe import Spy, _is_in
from saccade.eval.tasks import TASKS, draw_test
from saccade.fast import MOST, FastModel, take_norm
from saccade.kernels import PAGE
from saccade.kernels.edges import begin_step
from saccade.kernels.reference import Selection
from saccade.llm import LLM, Completion
from saccade.model.decoder import DecoderLayer
from saccade.model.transformer import Transformer
from saccade.params import SamplingParams

GROUPS = (1, 2, 16, 4, 11, 16)  # prompts that are decoded together; 50 in all
LENGTHS = (0, 1024, 4030, 512, 2048, 768)  # tokens of a long text, together with 64 of an answer
TAIL = 5  # the last tokens of a prompt are a step of their own: few tokens of one request
BARS = {"log_prob": 2e-2, "missed_mass": 1e-3, "gap": 1e-2, "texts": 0.02}


class Follower(FastModel):
    """The fast kernels, layer by layer on another model's inputs, or with another model's selections."""

    def __init__(self, llm: LLM, texts: int, longest: int) -> None:
        super().__init__(llm.model)
        self._is_covered = self._is_covered and llm.settings.kernels == "fast"
        s, pages = llm.settings, 1 + texts * -(-longest // PAGE)
        self.cache = Cache.allocate(llm.config, pages, s.dtype, s.device, s.mtp, s.index_cache)
        self.inputs: list[Tensor] | None = None  # of each layer [T, hidden]
        self.given: list[Selection] | None = None  # to each layer

    def follow(self, batch: Batch, inputs: list[Tensor] | None, given: list[Selection] | None) -> list[Selection]:
        """Selections of a step, whose last hidden state is `hidden`."""
        self.inputs, self.given = inputs, given
        seen: list[Selection] = []
        if self._is_covered and len(batch.tokens) <= MOST:
            self.hidden = self.forward(batch, self.cache, seen)
            return seen
        x, rotation = self.model.embed_tokens[batch.tokens].float(), self.model.rotary(batch.positions)
        for i, layer in enumerate(self.layers):
            shared = None if self.config.has_indexer(i) else seen[-1]
            x = inputs[i] if inputs else x
            x, selection = layer(x, rotation, batch, self.cache, given[i] if given else shared)
            seen.append(selection)
        self.hidden = self.model.norm(x)
        return seen

    def _attend(self, layer: Any, x: Any, rotation: Any, batch: Any, cache: Any, given: Any) -> Any:
        i = layer.attention.layer
        if self.inputs is not None:  # as if they were the rows of an embedding
            rows, norm = torch.arange(len(batch.tokens), device=batch.tokens.device), take_norm(layer.input_norm)
            x, _ = begin_step(rows, batch.positions, self.inputs[i], self._turns, norm)
        return super()._attend(layer, x, rotation, batch, cache, self.given[i] if self.given else given)


class Recorder:
    """A layer that keeps its input."""

    def __init__(self, layer: DecoderLayer, inputs: list[Tensor]) -> None:
        self.layer, self.attention, self.inputs = layer, layer.attention, inputs

    def __call__(self, x: Tensor, *rest: Any) -> tuple[Tensor, Selection]:
        self.inputs.append(x)
        return self.layer(x, *rest)


@contextmanager
def watching(model: Transformer) -> Iterator[tuple[Spy, list[Tensor]]]:
    """The model's attention and the inputs of its layers, kept while the context is open."""
    inputs: list[Tensor] = []
    with spying(model) as spy:
        layers, model.layers = model.layers, [Recorder(layer, inputs) for layer in model.layers]  # type: ignore[misc]
        try:
            yield spy, inputs
        finally:
            model.layers = layers


Step = list[tuple[int, int, int]]  # (text, first token, last) side by side


def plan_steps(texts: Sequence[Sequence[int]], starts: Sequence[int], chunk: int) -> Iterator[Step]:
    """Each text up to its start in prefill chunks, then a token of each a step, to the end of the shortest."""
    for i, start in enumerate(starts):
        edges = [*range(0, max(start - TAIL, 0), chunk), max(start - TAIL, 0), start]
        yield from ([(i, a, b)] for a, b in pairwise(edges) if a < b)
    for ahead in range(min(len(text) - start for text, start in zip(texts, starts, strict=True))):
        yield [(i, start + ahead, start + ahead + 1) for i, start in enumerate(starts)]


class Collector:
    """Rows [..., T, n] of steps, brought to their texts."""

    def __init__(self, texts: int) -> None:
        self._parts: list[list[Tensor]] = [[] for _ in range(texts)]

    def add(self, step: Step, rows: Tensor) -> None:
        row = 0
        for i, a, b in step:
            self._parts[i].append(rows[..., row : row + b - a, :].clone())
            row += b - a

    def join(self) -> list[Tensor]:
        return [torch.cat(parts, -2) for parts in self._parts]


def lay_out(llm: LLM, texts: Sequence[Sequence[int]], step: Step) -> Batch:
    """Waits for the step before, whose image on the host is overwritten."""
    if llm.settings.device.startswith("cuda"):
        torch.cuda.synchronize(llm.settings.device)
    pages = -(-max(map(len, texts)) // PAGE)
    owned = [range(1 + i * pages, 1 + (i + 1) * pages) for i in range(len(texts))]
    return llm.engine.buffers.fill([Run(texts[i][a:b], a, owned[i], b - a) for i, a, b in step])


def find_logits(llm: LLM, hidden: Tensor, batch: Batch) -> Tensor:
    """As the engine asks for them."""
    return torch.cat([llm.engine.model.logits(hidden[rows]) for rows in batch.logit_rows.split(LOGIT_ROWS)])


@torch.inference_mode()
def repeat(llm: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Logits [n, vocab] of each text by what the idle engine runs, graphs included."""
    logits = Collector(len(texts))
    with on(llm.settings.device):
        for step in plan_steps(texts, starts, llm.settings.max_batch_tokens):
            batch = lay_out(llm, texts, step)
            logits.add(step, find_logits(llm, llm.engine.model.forward(batch, llm.engine.cache), batch))
    return logits.join()


class Both(NamedTuple):
    """What the two models say of one text. Log-probabilities are of each token given those before it."""

    expected: Tensor  # f32 [n - 1]
    imposed: Tensor  # f32 [n - 1] fast, with the reference's selections
    free: Tensor  # f32 [n - 1] fast, with its own
    logits: Tensor  # f32 [n, vocab] the same
    masses: Tensor  # f32 [layers, n, K] the reference's attention over its selection, the mean over heads
    chosen: Tensor  # i32 [layers, n, K] its selection
    alone: Tensor  # i32 [layers, n, K] the fast path's, each layer on the reference's input
    together: Tensor  # i32 [layers, n, K] the fast path's on its own


@torch.inference_mode()
def run_both(reference: LLM, fast: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Both]:
    """Steps of `plan_steps` through both, side by side."""
    logits, masses, chosen, alone, together = (Collector(len(texts)) for _ in range(5))
    expected, imposed = Collector(len(texts)), Collector(len(texts))
    follower, imposer = (Follower(fast, len(texts), max(map(len, texts))) for _ in range(2))
    chunk = min(reference.settings.max_batch_tokens, fast.settings.max_batch_tokens)
    with on(fast.settings.device), watching(reference.model) as (spy, inputs):
        for step in plan_steps(texts, starts, chunk):
            batch = lay_out(reference, texts, step)
            spy.attention.clear()
            inputs.clear()
            seen: list[Selection] = []
            hidden = reference.engine.model.forward(batch, reference.engine.cache, seen)
            expected.add(step, find_logits(reference, hidden, batch))
            masses.add(step, torch.stack(spy.attention))
            chosen.add(step, torch.stack(seen))
            given, inputs_now = list(seen), list(inputs)
            batch = lay_out(fast, texts, step)
            alone.add(step, torch.stack(follower.follow(batch, inputs_now, None)))
            imposer.follow(batch, None, given)
            imposed.add(step, find_logits(fast, imposer.hidden, batch))
            found: list[Selection] = []
            hidden = fast.engine.model.forward(batch, fast.engine.cache, found)
            together.add(step, torch.stack(found))
            logits.add(step, find_logits(fast, hidden, batch))
    columns = [c.join() for c in (expected, imposed, logits, masses, chosen, alone, together)]
    results = []
    for text, a, b, c, *rest in zip(texts, *columns, strict=True):
        scores = [score(some, text) for some in (a, b, c)]
        results.append(Both(*scores, c, *rest))
    return results


def score(logits: Tensor, text: Sequence[int]) -> Tensor:
    following = torch.tensor(text[1 : 1 + len(logits)], device=logits.device)
    return logits[: len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0]


class Missed(NamedTuple):
    """Selections against the reference's, of one text, over tokens that see more than is selected."""

    tokens: int
    mass: Tensor  # f64 [layers] attention on what is missed, summed over tokens
    changed: Tensor  # f64 [layers] tokens with another selection


def find_missed(both: Both, theirs: Tensor, topk: int, cut: slice) -> tuple[Missed, Tensor]:
    """Of the tokens in `cut`; and where all layers of a token selected the same, bool [n]."""
    missed, same = [], []
    for selection, other, mass in zip(both.chosen, theirs, both.masses, strict=True):
        has = _is_in(selection, other) | (selection < 0)
        same.append(has.all(1))
        missed.append((mass * ~has).sum(1).double())
    is_same = torch.stack(same)
    place = torch.arange(is_same.shape[1], device=is_same.device)
    sparse = place[cut][place[cut] >= topk]
    mass = torch.stack(missed)[:, sparse].sum(1).cpu()
    return Missed(len(sparse), mass, (~is_same[:, sparse]).double().sum(1).cpu()), is_same.all(0)


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


def measure(
    reference: LLM, fast: LLM, prompts: Sequence[list[int]], tokens: int, seconds: float = math.inf
) -> dict[str, Any]:
    """All numbers for one pair of models; `tokens` are generated for each prompt, past its end. Prompts that would be
    begun after `seconds` are left out."""
    topk, begun, done = reference.config.index_topk, time.perf_counter(), 0
    room = min(reference.settings.max_length, tokens + max(map(len, prompts)))
    parts: dict[str, list[Part]] = {}
    missed: dict[str, list[Missed]] = {}
    texts: list[dict[str, Any] | None] = []
    repeats = {"eager and captured": True, "captured": True, "texts": True}
    for group in cut_groups(prompts):
        print(f"{done} of {len(prompts)} prompts, {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - begun > seconds:
            break
        done += len(group)
        few = min(tokens, room - max(map(len, group)))
        greedy = SamplingParams(max_tokens=few, temperature=0.0, ignore_eos=True, logprobs=20)
        expected, found, again = (llm.generate(group, greedy) for llm in (reference, fast, fast))
        repeats["texts"] &= [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in again]
        texts += [differ(a, b, reference.config.eos_token_ids) for a, b in zip(expected, found, strict=True)]
        whole = [prompt + answer.token_ids[:-1] for prompt, answer in zip(group, expected, strict=True)]
        starts = [len(prompt) - 1 for prompt in group]
        results = run_both(reference, fast, whole, starts)
        for begin, both in zip(starts, results, strict=True):
            kinds = {"each layer on the reference's input": both.alone, "end to end": both.together}
            for name, cut in (("prefill", slice(0, begin)), ("decode", slice(begin, None))):
                for kind, theirs in kinds.items():
                    lost, is_same = find_missed(both, theirs, topk, cut)
                    missed.setdefault(f"{name}, selection, {kind}", []).append(lost)
                scores = [x[cut].cpu() for x in (both.expected, both.imposed, both.free)]
                parts.setdefault(name, []).append(Part(*scores, is_same[:-1][cut].cpu()))
        if len(group) > 1 or len(texts) == 1:
            second, third = (repeat(fast, whole, starts) for _ in range(2))  # the first captures, this one replays
            same = all(both.logits.equal(b) for both, b in zip(results, second, strict=True))
            repeats["eager and captured"] &= same
            repeats["captured"] &= all(b.equal(c) for b, c in zip(second, third, strict=True))
    result: dict[str, Any] = {name: summarise(some) for name, some in parts.items()}
    for name, each in missed.items():
        count = max(sum(m.tokens for m in each), 1)
        result[name] = {
            "tokens": count,
            "missed_mass": (torch.stack([m.mass for m in each]).sum(0) / count).tolist(),
            "other_selection": (torch.stack([m.changed for m in each]).sum(0) / count).tolist(),
        }
    parted = [{"prompt": i, "tokens": len(prompts[i])} | d for i, d in enumerate(texts) if d is not None]
    result["greedy"] = {"texts": len(texts), "tokens": tokens, "parted": parted}
    result["repeats"] = repeats
    result["lengths"] = [len(prompt) for prompt in prompts[:done]]
    return result


class Part(NamedTuple):
    """Log-probabilities of some tokens, and whether all layers selected the same for them."""

    expected: Tensor
    imposed: Tensor
    free: Tensor
    is_same: Tensor


def summarise(parts: Sequence[Part]) -> dict[str, Any]:
    expected, imposed, free, is_same = (torch.cat(column) for column in zip(*parts, strict=True))
    held, loose = (imposed - expected).abs(), (free - expected).abs()
    return {
        "tokens": len(expected),
        "largest, selection given": float(held.max()),
        "mean, selection given": float(held.mean()),
        "tokens with the same selection": int(is_same.sum()),
        "largest of these": float(loose[is_same].max()) if is_same.any() else 0.0,
        "over the bar of these": int((loose[is_same] > BARS["log_prob"]).sum()),
        "largest of all": float(loose.max()),
        "mean of all": float(loose.mean()),
    }


def judge(result: dict[str, Any]) -> dict[str, bool]:
    """Which bars hold. A selection that differs anywhere before a token changes what its own selects from: strictly
    the same selections are those that are given."""
    parts = [result[name] for name in ("prefill", "decode")]
    masses = [max(value["missed_mass"]) for name, value in result.items() if "reference's input" in name]
    parted = [d for d in result["greedy"]["parted"] if d["is_within_answer"]]
    near = all(d["gap"] < BARS["gap"] for d in parted)
    return {
        "a: log-probabilities": all(part["largest, selection given"] <= BARS["log_prob"] for part in parts),
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no prompt is begun")
    parser.add_argument("--index-cache", action="append", choices=("bf16", "fp8"), help="default: both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for index_cache in asked.index_cache or ("bf16", "fp8"):
        start = time.perf_counter()
        record = describe_run(torch.device(asked.device))
        options = f"--prompts {asked.prompts} --tokens {asked.tokens} --longest {asked.longest}"
        record |= {"command": f"python -m tools.gpu_parity {options} --index-cache {index_cache}"}
        record |= {"model": asked.model or "bundled", "dtype": "auto", "index_cache": index_cache, "bars": BARS}
        pair = [
            LLM(asked.model, asked.device, index_cache=index_cache, kernels=kernels)
            for kernels in ("reference", "fast")
        ]
        prompts = draw_prompts(pair[0], asked.prompts, asked.longest)
        found = measure(pair[0], pair[1], prompts, asked.tokens, asked.seconds)
        if pair[0].model.mtp is not None:
            found["drafts"] = measure_drafts(pair[0], pair[1], prompts[:6])
        found["holds"] = judge(found)
        print(f"index cache {index_cache}, {record['device']}", *show(found), sep="\n", flush=True)
        record |= found | {"seconds": time.perf_counter() - start}
        name = "-".join(["parity", Path(record["model"]).name, index_cache, record["device"].split()[-1].lower()])
        (asked.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        del pair


if __name__ == "__main__":
    main()
