"""What the runs of runs.py differ in, as numbers, and the bars they are held against. Next: measure.py."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.api.outputs import Completion
from saccade.eval.probe import _is_in
from tools.gpu_parity.runs import Both

BARS = {
    "log_prob": 2e-2,
    "all_given": 1e-3,  # the same, where all that is all or nothing is given
    # Tokens above the bar where only the selection is given: by how much at most, and their share. The reference, moved
    # by the last bit of fp32, has none or one of 66,743, which is 3.3e-2 off.
    "unsettled": 0.1,
    "unsettled_share": 3e-5,
    "missed_mass": 1e-3,
    "gap": 1e-2,
    "texts": 0.02,
    "other_experts": 1e-3,
}


# Where inputs are rounded, a number between two roundings may fall to the other side, and moves by the whole step. So
# the bars follow how far the reference at that setting moves if its layers' inputs move by the last bit of fp32: by
# 1.4e-4 at most and 1.0e-6 as a mean in "exact", 1.2e-2 and 1.9e-4 in "bf16", 4.0e-2 and 3.3e-4 in "fp8", where 6 of
# 3,263 tokens move by more than 2e-2 (`python -m tools.gpu_parity.shaken --prompts 6 --longest 700 --times 1
# --activations fp8`, on a CPU, before anything was measured on a GPU). A run has 20 times as many tokens, and masked
# attention rounds keys, values and probabilities beside: the bars are some three times that. What experts and
# selections do was not shaken: these two are guesses.
ROUNDED_BARS: dict[str, dict[str, float]] = {
    "exact": {},
    "bf16": {
        "log_prob": 4e-2, "all_given": 4e-2, "unsettled": 0.2, "unsettled_share": 1e-3, "gap": 4e-2,
        "missed_mass": 5e-3, "other_experts": 2e-2,
    },
    "fp8": {
        "log_prob": 0.12, "all_given": 0.12, "unsettled": 0.4, "unsettled_share": 2e-3, "gap": 0.12,
        "missed_mass": 5e-3, "other_experts": 2e-2,
    },
}  # fmt: skip


def find_bars(activations: str) -> dict[str, float]:
    return BARS | ROUNDED_BARS[activations]


class Missed(NamedTuple):
    """Selections against the reference's, of one text, over tokens that see more than is selected."""

    tokens: int
    mass: Tensor  # f64 [layers] attention on what is missed, summed over tokens
    most: Tensor  # f64 [layers] of one token
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
    mass = torch.stack(missed)[:, sparse].cpu()
    most = mass.amax(1) if len(sparse) else mass.sum(1)
    return Missed(len(sparse), mass.sum(1), most, (~is_same[:, sparse]).double().sum(1).cpu()), is_same.all(0)


class Part(NamedTuple):
    """Log-probabilities of some tokens, whether all layers selected the same for each, and whether it would have chosen
    the same experts with all else given."""

    expected: Tensor
    imposed: Tensor
    guided: Tensor
    free: Tensor
    is_same: Tensor
    is_alike: Tensor


def summarise(parts: Sequence[Part], bar: float = BARS["log_prob"]) -> dict[str, Any]:
    """Of all prompts, in their order; `bar`: above which tokens are counted."""
    worst = [float((part.imposed - part.expected).abs().max()) for part in parts]
    prompt = worst.index(max(worst))
    place = int((parts[prompt].imposed - parts[prompt].expected).abs().argmax())
    expected, imposed, guided, free, is_same, is_alike = (torch.cat(column) for column in zip(*parts, strict=True))
    held, strict, loose = ((found - expected).abs() for found in (imposed, guided, free))
    return {
        "tokens": len(expected),
        "largest, selection given": float(held.max()),
        "its prompt, token": [prompt, place],
        "over the bar": count_over(held, bar),
        "mean, selection given": float(held.mean()),
        "largest, experts and cached rows given too": float(strict.max()),
        "mean of that": float(strict.mean()),
        "other experts, all else given": int((~is_alike).sum()),
        "tokens with the same selection": int(is_same.sum()),
        "largest of these": float(loose[is_same].max()) if is_same.any() else 0.0,
        "over the bar of these": count_over(loose[is_same], bar),
        "largest of all": float(loose.max()),
        "mean of all": float(loose.mean()),
    }


def count_over(differences: Tensor, bar: float = BARS["log_prob"]) -> int:
    """NaN is above every bar."""
    return int((~(differences <= bar)).sum())


def judge(result: dict[str, Any], bars: dict[str, float] = BARS) -> dict[str, bool]:
    """Which bars hold. A selection that differs anywhere before a token changes what its own selects from: strictly
    the same selections are those that are given.

    Two more choices are all or nothing: which experts, and to which BF16 number a cached row rounds. Where either is a
    tie within fp32's own rounding, the reference does not always agree with itself (shaken.py), so a few tokens may be
    above the bar, and not far. With all three given, every token must hold, to a twentieth of it. Runs that select for
    themselves are held where all layers of a token selected the same.
    """
    parts = [result[name] for name in ("prefill", "decode")]
    masses = [max(value["missed_mass"]) for name, value in result.items() if "reference's input" in name]
    parted = [d for d in result["greedy"]["parted"] if d["is_within_answer"]]
    near = all(d["gap"] < bars["gap"] for d in parted)
    return {
        "a: log-probabilities of every token": all(
            part["largest, selection given"] <= bars["log_prob"]
            and part["other experts, all else given"] <= bars["other_experts"] * part["tokens"]
            for part in parts
        ),
        "a: but for few that the reference does not settle": all(
            part["largest, experts and cached rows given too"] <= bars["all_given"]
            and part["largest, selection given"] <= bars["unsettled"]
            and max(part["over the bar"], part["over the bar of these"]) <= bars["unsettled_share"] * part["tokens"]
            for part in parts
        ),
        "b: missed attention mass": max(masses) <= bars["missed_mass"],
        "c: greedy text": near and len(parted) <= bars["texts"] * result["greedy"]["texts"],
        "d: repeats itself": all(result["repeats"].values()),
    }


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
