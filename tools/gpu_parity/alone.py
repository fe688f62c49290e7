"""Whether a text depends on who else is served: `python -m tools.gpu_parity.alone --activations fp8`.

The bundled model answers the same prompts alone and many at a time, greedily: as it ends its answers, and made to go on
behind them, where it is sure of nothing. Where two texts part, the gap between the two candidates there says whether a
near tie fell to the other side. Next: engine/scheduling/step_kinds.py, on which it depends.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from saccade import LLM, SamplingParams
from saccade.eval.tasks import TASKS, draw_test
from saccade.kernels import ACTIVATION_NAMES

LENGTHS = (64, 100, 200, 400, 700, 1000)  # of long texts, in pieces


class Parted(NamedTuple):
    """A text that is another one among others."""

    prompt: int  # which
    tokens: int  # of the prompt
    answer: int  # tokens of its answer
    place: int  # of the first other token
    gap: float  # between the two likeliest there, in log-probability


class Alone(NamedTuple):
    """What became of the prompts."""

    answers: int  # that are the same
    parted: list[Parted]  # behind their answers, or in them


def draw_prompts(count: int) -> list[str]:
    """Problems of every task in turn, of lengths by chance, the same everywhere."""
    dice = Random(5)
    return [draw_test(list(TASKS)[i % len(TASKS)], i, dice.choice(LENGTHS)).prompt for i in range(count)]


def compare_alone(llm: LLM, prompts: Sequence[str], together: int, tokens: int) -> Alone:
    """Each prompt alone, and `together` at a time; made to have `tokens` tokens of text."""
    answer = SamplingParams(temperature=0.0, max_tokens=200)
    text = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    groups = [prompts[i : i + together] for i in range(0, len(prompts), together)]
    alone, among = ([llm.generate(p, answer)[0] for p in prompts], [c for g in groups for c in llm.generate(g, answer)])
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, among, strict=True))
    texts = [llm.generate(p, text)[0].token_ids for p in prompts]
    others = [c.token_ids for g in groups for c in llm.generate(g, text)]
    parted = []
    for i, (one, other) in enumerate(zip(texts, others, strict=True)):
        if one != other:
            place = next(k for k, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            probed = llm.generate(prompts[i], replace(text, logprobs=2))[0]
            first, second = (logprob for _, logprob in (probed.logprobs or [])[place].top[:2])
            parted.append(Parted(i, len(llm.encode(prompts[i])), len(alone[i].token_ids), place, first - second))
    return Alone(same, parted)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare texts of requests alone and among others.")
    parser.add_argument("--activations", default="auto", choices=["auto", *ACTIVATION_NAMES])
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--together", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=120, help="of the texts that go on behind answers")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args(arguments)
    llm = LLM(device=asked.device, prefix_cache=False, activations=asked.activations)
    prompts = draw_prompts(asked.prompts)
    found = compare_alone(llm, prompts, asked.together, asked.tokens)
    sizes = [len(llm.encode(prompt)) for prompt in prompts]
    print(
        f"{llm.settings.activations}, {llm.settings.kernels} kernels: {len(prompts)} prompts of {min(sizes)} to "
        f"{max(sizes)} tokens, alone and {asked.together} at a time: {found.answers} answers are the same; of texts of "
        f"{asked.tokens} tokens {len(found.parted)} part"
    )
    for each in found.parted:
        print(f"  {each}")


if __name__ == "__main__":
    main()
