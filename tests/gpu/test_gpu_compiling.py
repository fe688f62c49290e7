"""A start whose kernels other processes compile: the steps of an LLM then find them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

START = """
import json
from triton import knobs
from saccade import LLM, SamplingParams

compiled = []
knobs.compilation.listener = lambda src, metadata, cache_hit, **rest: cache_hit or compiled.append(src.fn.fn.__name__)
llm = LLM(device="cuda", cache_tokens=65536)
started = llm._loaded.compiling is not None
if started:
    for group in range(4):
        llm._loaded.compiling.wait(group)
    llm._loaded.compiling._thread.join()
    assert not llm._loaded.compiling.failures, llm._loaded.compiling.failures
for sizes in ([128], [1], [20], [300], [1500], [8] * 3, [9] * 32):
    prompts = [[(7 * i + j) % 200 for j in range(size)] for i, size in enumerate(sizes)]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
print(json.dumps([started, compiled]))
"""


def test_the_main_process_compiles_nothing_and_the_next_start_needs_no_process(tmp_path: Path) -> None:
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "SACCADE_COMPILERS": "8"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    for expected in ([True, []], [False, []]):
        ran = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=env, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert json.loads(ran.stdout.splitlines()[-1]) == expected
