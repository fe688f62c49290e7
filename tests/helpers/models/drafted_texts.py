"""Texts with drafts beside texts without, over prompts of the bundled model's tasks. Shared by tests of a CPU and of a
GPU."""

from collections.abc import Iterator, Sequence
from typing import Any

from saccade import LLM, SamplingParams
from saccade.api.outputs import Completion
from saccade.eval.tasks import draw_test
from tools.gpu_parity.compare import differ


def draw_prompts(count: int, length: int) -> list[str]:
    """Word problems, and texts of about `length`, of half and of a quarter of it, mixed."""
    tasks = ("words", "recall", "story", "words", "recall")
    return [draw_test(tasks[i % 5], i, length >> (i // 5 % 3)).prompt for i in range(count)]


def run_all(
    prompts: Sequence[str], tokens: int, drafts: Sequence[int | str], **options: Any
) -> Iterator[tuple[int | str, LLM, list[Completion], list[Completion]]]:
    """For each number of drafts: it, the model with its counts, texts without drafts and texts with."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=5)
    plain = LLM(**options).generate(prompts, params)
    for k in drafts:
        llm = LLM(speculate=k, **options)
        # Log-probabilities are for telling near ties; without them a GPU replays its steps, and those are what is used.
        yield k, llm, plain, llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens))


def find_parted(llm: LLM, plain: Sequence[Completion], found: Sequence[Completion]) -> list[dict[str, Any]]:
    """Where texts part from those without drafts, and how near the two candidates were there."""
    parted = (differ(a, b, llm.config.eos_token_ids) for a, b in zip(plain, found, strict=True))
    return [{"prompt": i, **d} for i, d in enumerate(parted) if d is not None]


def judge(parted: Sequence[dict[str, Any]], prompts: int) -> bool:
    """Whether every difference is a near tie, and in at most 2 % of the prompts."""
    return all(d["gap"] < 1e-2 for d in parted) and len(parted) <= 0.02 * prompts
