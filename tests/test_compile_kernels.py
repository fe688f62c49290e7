"""Every kernel of a step compiles for a Hopper GPU. In processes of their own: here, kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize(
    "step", ["decode 1 131072", "decode 8 8192 fp8", "prefill 2048 8192", "draft 3 8192", "attend 128 8192"]
)
def test_a_step_of_one_rank_compiles(step: str) -> None:
    """Full-size matrices, two layers. A context of 131,072 takes a second launch to select, FP8 keys other loads; 128
    heads are those of a rank that has them all."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, SCRIPT, *step.split()], capture_output=True, text=True, env=env, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " 0 failed" in ran.stdout
