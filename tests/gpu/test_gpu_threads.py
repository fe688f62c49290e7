"""Fresh threads on a CUDA device, which have not used it before: its context is made current where they enter."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from drafted_texts import draw_prompts, find_parted, judge

from saccade import LLM, SamplingParams
from saccade.engine.shared import make_current

LIMIT = 300
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=5)


def fresh(call: Callable[[], Any]) -> Any:
    """What `call` returns, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(LIMIT)


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [0, 3])
def test_an_llm_is_called_from_fresh_threads(speculate: int) -> None:
    """Prompts of hundreds of tokens: their steps are of kernels with tensor descriptors. Some threads compute on a
    stream of their own, and one under a trainer's autocast."""
    prompts = draw_prompts(8, 512)
    llm = LLM(device="cuda", kernels="fast", speculate=speculate)
    assert min(len(llm.encode(prompt)) for prompt in prompts) > 16
    plain = LLM(device="cuda", kernels="fast").generate(prompts, GREEDY)
    first = fresh(lambda: llm.generate(prompts[:1], GREEDY))

    def ask(place: int) -> Any:
        stream = torch.cuda.Stream() if place % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(stream), torch.autocast("cuda", dtype=torch.float16, enabled=place == 2):
            if place % 4 == 3:
                pieces = list(llm.stream(prompts[place], GREEDY))
                return [token for piece in pieces for token in piece.token_ids]
            return llm.generate(prompts[place], GREEDY)[0]

    with ThreadPoolExecutor(8) as pool:  # one prompt each, together
        found = [future.result(LIMIT) for future in [pool.submit(ask, i) for i in range(8)]]
    whole = [(0, first[0])] + [(i, each) for i, each in enumerate(found) if not isinstance(each, list)]
    parted = find_parted(llm, [plain[i] for i, _ in whole], [each for _, each in whole])
    streamed = sum(found[i] != plain[i].token_ids for i in range(8) if isinstance(found[i], list))
    print(f"speculate {speculate}: parted {parted}, of the streams {streamed}; {llm.stats}")
    assert judge(parted, 50) and streamed <= 1  # near ties: steps hold other requests than they did alone
    pages = llm.engine.scheduler.pages
    assert not llm.engine.jobs and pages.free == pages.count - 1


@pytest.mark.gpu
def test_a_descriptor_is_made_in_a_thread_that_has_entered() -> None:
    """Where nothing but torch's allocator is asked before, as the second call here: all its memory is known."""
    from saccade.kernels.types import Matrix
    from saccade.ops.gpu import multiply_any

    x = torch.randn(64, 512, device="cuda")
    w = Matrix(torch.randn(256, 512, device="cuda").to(torch.float8_e4m3fn), torch.ones(2, 4, device="cuda"))
    wanted = multiply_any(x, w)

    def run() -> torch.Tensor:
        make_current("cuda")
        return multiply_any(x, w)

    assert all(torch.equal(fresh(run), wanted) for _ in range(3))
