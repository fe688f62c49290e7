"""Every kernel of a step compiles for a Hopper GPU. In processes of their own: here, kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize(
    "steps",
    [
        ("decode 1 131072", "draft 3 8192", "decode 8 8192 fp8 fp8", "decode 1 8192 bf16 fp8"),
        ("prefill 2048 8192", "decode 40 8192", "decode 40 8192 bf16 fp8", "attend 128 8192", "prompt 4096 8192"),
        ("recur 8 128", "streams 4096 4", "flash-decode 1 8192", "draw 2 129280"),
    ],
    ids=["few tokens", "many tokens", "GLM-5.3-Flash"],
)
def test_steps_of_one_rank_compile(steps: tuple[str, ...]) -> None:
    """Full-size matrices, two layers. A context of 131,072 takes a second launch to select, FP8 caches other loads; 128
    heads are those of a rank that has them all. The recurrence of a rank of 8 and streams spill no register. Steps
    that have kernels in common share a process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, SCRIPT, *steps], capture_output=True, text=True, env=env, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.count(" kernels compiled, 0 failed") == len(steps)
