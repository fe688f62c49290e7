"""The bundled checkpoint on a CUDA device, through the product's own path, against the CPU."""

import pytest
import torch

from saccade import LLM, SamplingParams

PROMPTS = ["The eye jumps to", "The few points that matter. " * 12, "One. Two. Three. " * 40]  # most beyond index_topk


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_bundled_checkpoint_gives_the_greedy_tokens_of_the_cpu(dtype: str) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
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
