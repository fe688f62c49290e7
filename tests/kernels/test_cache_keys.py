"""A kernel's key in Triton's cache does not depend on what was launched before it. In a process of its own: here, kernels
are interpreted."""

import json
import os
import subprocess
import sys

import pytest
from triton.runtime import jit

from saccade.kernels.cache_keys import ask_always, ask_first

# Keys of kernels that share functions with constants, each in a fork of its own, then all in a row.
KEYS = """
import json, os
from saccade.kernels.attention import expand
from saccade.kernels.linear import gemm, head_gemm, split_k
from saccade.kernels.moe import grouped_gemm

kernels = [split_k.split_k_kernel, head_gemm._multiply_heads, grouped_gemm.multiply_experts, gemm._multiply_blocks,
           expand._expand]

def find_keys(some):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps([kernel.cache_key for kernel in some]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.load(file)

alone = [find_keys([kernel])[0] for kernel in kernels]
print(json.dumps([alone, find_keys(kernels), find_keys(kernels[::-1])[::-1]]))
"""


def test_the_order_of_launches_changes_no_key() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True, env=env, timeout=100)
    assert ran.returncode == 0, ran.stderr[-2000:]
    alone, forth, back = json.loads(ran.stdout.splitlines()[-1])
    assert alone == forth == back and len(set(alone)) == 5


def test_a_called_function_has_its_key_before_its_constants_are_read() -> None:
    """What Triton 3.6 does not do by itself."""
    events: list[str] = []

    class Called:
        @property
        def cache_key(self) -> str:
            events.append("key")
            return "k"

    ask_first(lambda finder, function: events.append("constants"))(None, Called())
    assert events == ["key", "constants"]


def test_a_triton_that_names_it_otherwise_does_not_end_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "DependenciesFinder", type("Finder", (), {}))
    ask_always()
    monkeypatch.delattr(jit, "DependenciesFinder")
    ask_always()
