"""All numbers for a pair of models: prompts, groups of them, what is run. Next: __main__.py."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch

from saccade.api.llm import LLM
from saccade.api.loading.machine import make_drafter
from saccade.engine.params import SamplingParams
from saccade.eval.drafts import find_accepted
from saccade.eval.tasks import TASKS, draw_test
from tools.gpu_parity.compare import BARS, Missed, Part, differ, find_missed, summarise
from tools.gpu_parity.runs import repeat, run_both

GROUPS = (1, 2, 16, 4, 11, 16)  # prompts that are decoded together; 50 in all
LENGTHS = (0, 1024, 4030, 512, 2048, 768)  # tokens of a long text, together with 64 of an answer


def draw_prompts(llm: LLM, count: int, longest: int) -> list[list[int]]:
    """Prompts of at most `longest` tokens: short ones, and long texts of several lengths. Of a model without a
    tokenizer, tokens by chance."""
    if llm.tokenizer is None:
        dice = Random(0)
        lengths = [min(LENGTHS[i % len(LENGTHS)] or 40, longest) for i in range(count)]
        return [[dice.randrange(llm.config.vocab_size) for _ in range(length)] for length in lengths]
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


def measure(
    reference: LLM,
    fast: LLM,
    prompts: Sequence[list[int]],
    tokens: int,
    seconds: float = math.inf,
    bar: float = BARS["log_prob"],
) -> dict[str, Any]:
    """All numbers for one pair of models; `tokens` are generated for each prompt, past its end. Prompts that would be
    begun after `seconds` are left out. `bar`: of log-probabilities; tokens above it are counted."""
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
            is_alike = (both.experts == both.taken).all(2).all(0)
            kinds = {"each layer on the reference's input": both.alone, "end to end": both.together}
            for name, cut in (("prefill", slice(0, begin)), ("decode", slice(begin, None))):
                for kind, theirs in kinds.items():
                    lost, is_same = find_missed(both, theirs, topk, cut)
                    missed.setdefault(f"{name}, selection, {kind}", []).append(lost)
                scores = [x[cut].cpu() for x in (both.expected, both.imposed, both.guided, both.free)]
                parts.setdefault(name, []).append(Part(*scores, is_same[:-1][cut].cpu(), is_alike[:-1][cut].cpu()))
        if len(group) > 1 or len(texts) == 1:
            second, third = (repeat(fast, whole, starts) for _ in range(2))  # the first captures, this one replays
            same = all(both.logits.equal(b) for both, b in zip(results, second, strict=True))
            repeats["eager and captured"] &= same
            repeats["captured"] &= all(b.equal(c) for b, c in zip(second, third, strict=True))
    result: dict[str, Any] = {name: summarise(some, bar) for name, some in parts.items()}
    for name, each in missed.items():
        count = max(sum(m.tokens for m in each), 1)
        result[name] = {
            "tokens": count,
            "missed_mass": (torch.stack([m.mass for m in each]).sum(0) / count).tolist(),  # the mean of these tokens
            "most_of_a_token": torch.stack([m.most for m in each]).amax(0).tolist(),
            "other_selection": (torch.stack([m.changed for m in each]).sum(0) / count).tolist(),
        }
    parted = [{"prompt": i, "tokens": len(prompts[i])} | d for i, d in enumerate(texts) if d is not None]
    result["greedy"] = {"texts": len(texts), "tokens": tokens, "parted": parted}
    result["repeats"] = repeats
    result["lengths"] = [len(prompt) for prompt in prompts[:done]]
    return result


def measure_drafts(reference: LLM, fast: LLM, prompts: Sequence[list[int]]) -> dict[str, float]:
    """At how many places both MTP layers' drafts are right, or both wrong."""
    alike, s = [], reference.settings
    drafters = make_drafter(reference.model), make_drafter(fast.model)
    for prompt in prompts:
        a, b = (
            find_accepted(d, fast.config, prompt, s.dtype, s.device, s.index_cache, s.latent_cache) for d in drafters
        )
        alike.append((a == b).float())
    return {"places": sum(map(len, alike)), "alike": float(torch.cat(alike).mean())}
