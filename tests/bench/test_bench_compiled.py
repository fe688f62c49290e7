"""Kernels that processes compile beside a start: each is compiled by one of them, none is launched. In processes of
their own: here, kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saccade.bench.compiled import Compiling
from saccade.bench.steps.start import bench_start
from saccade.errors import RequestError

KERNELS = """
import sys, json
import torch, triton, triton.language as tl
from saccade.bench.compiled import compile_instead

@triton.jit
def fill(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)

seen, x = [], torch.zeros(64)
compile_instead(lambda name, options, launch: seen.append(launch() is not None), int(sys.argv[1]), 2)
for n in (16, 32, 16, 64, 16):  # 16 is launched again and again
    fill[(1,)](x, n, num_warps=1)
assert not x.any()
print(json.dumps(seen))
"""


def test_each_kernel_is_compiled_by_one_process_and_launched_by_none(tmp_path: Path) -> None:
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, script, str(share)], stdout=subprocess.PIPE, text=True, env=env)
        for share in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in processes)
    assert first == [True, False, True, True, True] and second == [False, True, False, False, False]
    assert len(list((tmp_path / "cache").rglob("fill.cubin"))) == 3


def test_a_process_that_cannot_compile_says_why() -> None:
    with pytest.raises(RequestError, match="a process that compiles kernels failed: .*no-such-shape"):
        Compiling({"shape": "no-such-shape", "context": 8, "batch": 1, "chunk": 8}, 1).wait()


def test_compilers_are_for_a_gpu() -> None:
    with pytest.raises(RequestError, match="compilers: kernels are compiled beforehand for a GPU"):
        bench_start("bundled", 1, context=8, device="cpu", compilers=2)
    with pytest.raises(RequestError, match="compilers: expected a number of processes, 0 or more, found -1"):
        bench_start("bundled", 1, context=8, device="cpu", compilers=-1)
