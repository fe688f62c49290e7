"""Tokens a second of the bundled model by number of drafts, and of "auto": what its rule (pace.py) loses to the best.

python -m tools.kernel_bench.drafts [cuda | cpu]: answers of 256 tokens, one and eight at a time; the first of a
process, which compile and capture, and those after them. Nothing is asserted: times are for people.
"""

import sys
import time
from collections.abc import Sequence

from saccade import LLM, SamplingParams
from saccade.eval.tasks import draw_test

GREEDY = SamplingParams(temperature=0.0, max_tokens=256, ignore_eos=True)


def measure(llm: LLM, prompts: Sequence[str]) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    tokens = sum(len(made.token_ids) for made in llm.generate(prompts, GREEDY))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for requests in (1, 8):
        prompts = [draw_test("words", i).prompt for i in range(10 * requests)]
        best = 0.0
        for k in (0, 1, 2, 3, 4, 5, "auto"):
            llm = LLM(device=device, speculate=k, max_requests=requests)
            first = measure(llm, prompts[:requests])
            measure(llm, prompts[requests : 3 * requests])
            later = measure(llm, prompts[3 * requests :])
            best = max(best, later)
            told = f"first {first:7.0f} tokens/s, later {later:7.0f}, {later / best:.2f} of the best so far"
            print(f"{requests} at a time, speculate {k}: {told}", flush=True)
        print(llm.stats)


if __name__ == "__main__":
    main()
