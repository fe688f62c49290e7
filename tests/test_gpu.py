"""The bundled checkpoint on a CUDA device, through the product's own path, against the CPU."""

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.eval.evaluate import evaluate
from saccade.eval.show import show_report
from saccade.eval.tasks import draw_test

PROMPTS = [draw_test("words", 0).prompt, *(draw_test(task, 0, 512).prompt for task in ("recall", "story"))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_bundled_checkpoint_gives_the_greedy_tokens_of_the_cpu(dtype: str) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=48)
    cpu, gpu = (LLM(device=device, dtype=dtype) for device in ("cpu", "cuda"))
    expected, found = (llm.generate(PROMPTS, greedy) for llm in (cpu, gpu))
    alike = [a.token_ids == b.token_ids for a, b in zip(expected, found, strict=True)]
    tokens = cpu.encode(PROMPTS[2])
    difference = (torch.tensor(cpu.score(tokens)) - torch.tensor(gpu.score(tokens))).abs()
    print(f"{dtype}: same greedy tokens {alike}; log-probabilities differ by at most {difference.max():.1e}")
    if dtype == "float32":
        assert all(alike) and difference.max() < 1e-4
    else:  # a near tie in the selection may fall the other way
        assert difference.median() < 5e-3


@pytest.mark.gpu
def test_held_out_problems_are_answered_at_the_full_context() -> None:
    report = evaluate(None, 100, 4096, probed=4, device="cuda")
    print(show_report(report))
    shares = {m.task: m.share for m in report.matches}
    assert shares["words"] >= 0.95 and shares["recall"] >= 0.95 and shares["story"] >= 0.8
    assert all(d.share >= 0.6 for d in report.drafts)
    fp32, fused = report.arrangements[:2]
    assert fused.exact == fp32.exact and max(m or 0.0 for m in fused.missed_mass) < 1e-3
