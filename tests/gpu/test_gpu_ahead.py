"""Steps that are launched ahead, and captured steps with prompts in them: the tokens of steps that are neither."""

from random import Random

import pytest
import torch

from saccade.bench.rig import build_rig
from saccade.bench.steps.traffic import TrafficTask, build_engine
from saccade.engine.params import SamplingParams


@pytest.mark.gpu
def test_tokens_are_the_same_ahead_and_with_captured_prompts() -> None:
    """All requests are there from the beginning, and their ends are known: each step has the same batch in any way, so
    that tokens are equal without exception. Twice, because a shape is captured when it comes for the second time."""
    rig = build_rig("bundled", None, torch.device("cuda"))
    task, found = TrafficTask(150, 40, 256), []
    for ahead, mixed in ((False, 16), (True, 16), (False, 512), (True, 512)):
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
        print(f"ahead {ahead}, captured up to {mixed} tokens with prompts: {runner.count_recorded()} graphs")
    assert all(tokens == found[0] for tokens in found)
