"""Steps that are launched ahead, captured steps with prompts in them, and choices of tokens in graphs: the tokens of
steps that are none of these."""

from random import Random

import pytest
import torch

from saccade.bench.rig import build_rig
from saccade.bench.steps.clients import TrafficTask
from saccade.bench.steps.traffic import build_engine
from saccade.engine.params import SamplingParams


@pytest.mark.gpu
def test_tokens_are_the_same_ahead_and_with_captured_prompts() -> None:
    """All requests are there from the beginning, and their ends are known: each step has the same batch in any way, so
    that tokens are equal without exception. Twice, because a shape is captured when it comes for the second time."""
    rig = build_rig("bundled", None, torch.device("cuda"))
    task, found = TrafficTask(150, 40, 256), []
    for ahead, mixed in (("off", 16), ("on", 16), ("off", 512), ("on", 512), ("auto", 512)):
        engine, runner = build_engine(rig, 48, task, 48 * 4 + 1, ahead, mixed)
        for _ in range(2):
            dice, jobs = Random(5), []
            for i in range(60):
                prompt = [dice.randrange(rig.shape.config.vocab_size) for _ in range(dice.randint(5, 150))]
                params = SamplingParams(max_tokens=8 + i % 32, temperature=i % 2 / 2, seed=i, ignore_eos=True)
                jobs.append(engine.add(prompt, params))
            while engine.jobs:
                engine.step()
            found.append([job.request.generated for job in jobs])
        print(f"launched ahead {ahead}, captured up to {mixed} tokens with prompts: {runner.count_recorded()} graphs")
    assert all(tokens == found[0] for tokens in found)


GREEDY = {"temperature": 0.0}
RANDOM = {"temperature": 1.0}
USUAL = [
    GREEDY, RANDOM, RANDOM | {"top_k": 3}, RANDOM | {"top_p": 0.6}, RANDOM | {"min_p": 0.1}, {"temperature": 0.6, "top_p": 0.95},
    GREEDY | {"logprobs": 2}, RANDOM | {"logprobs": 0}, RANDOM | {"logprobs": 3, "prompt_logprobs": 1},
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", ["off", "on"])
def test_a_choice_in_a_graph_is_that_of_a_step_without_one(ahead: str) -> None:
    """Greedy rows, sampled ones and log-probabilities, each kind alone and together. Twice, because a shape is captured
    when it comes for the second time; a graph that read an earlier step's numbers would choose otherwise."""
    rig = build_rig("bundled", None, torch.device("cuda"))
    groups, found = [[GREEDY] * 4, [RANDOM] * 4, USUAL[:6] * 2, USUAL * 2, [GREEDY] * 4], []
    for is_captured in (False, True):
        engine, runner = build_engine(rig, 18, TrafficTask(150, 40, 256), 18 * 4 + 1, ahead)
        if not is_captured:
            runner._steps._recordings.run = lambda held, how, step: step()
        for _ in range(2):
            for group in groups:
                dice, jobs = Random(5), []
                for i, options in enumerate(group):
                    prompt = [dice.randrange(rig.shape.config.vocab_size) for _ in range(dice.randint(5, 60))]
                    params = SamplingParams(max_tokens=30, seed=i, ignore_eos=True, **options)  # type: ignore[arg-type]
                    jobs.append(engine.add(prompt, params))
                while engine.jobs:
                    engine.step()
                found.append([(job.request.generated, job.logprobs, job.prompt_logprobs) for job in jobs])
        print(f"launched ahead {ahead}, captured {is_captured}: {runner.count_recorded()} graphs")
    half = len(found) // 2
    assert found[:half] == found[half:] and runner.count_recorded() > 0
    assert found[0] == found[4] and len({str(answers) for answers in found[:4]}) == 4
