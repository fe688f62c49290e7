"""The run on several GPUs of one host, part by part: `python -m tools.run_ranks --tp 2`; on eight `--tp 8 --layers 61`.

Parts: `allreduce` (sums against NCCL and gloo), `tests` (tests/gpu/test_gpu_ranks.py: bits, graphs, log-probabilities,
a killed rank), `decode` and `prefill` (DeepSeek-V3.2 on these ranks, and with few layers on one rank), `steps` (1,000
steps, checksums of all ranks), `text` (the bundled model). Each command is a process with a time limit, so that one
that hangs costs no other. Records are written to --out. NVLink multicast stays off.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MULTICAST_OFF = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip
LAYERS_OF_ONE = 8  # of DeepSeek-V3.2 that one H200 holds: 3 dense ones and 5 of 11.5 GB

TEXT = """
from saccade import LLM, SamplingParams
from saccade.eval.tasks import draw_test
prompts = [draw_test(task, 0, 512).prompt for task in ("words", "recall", "story")]
greedy = SamplingParams(temperature=0.0, max_tokens=48)
found = [[c.text for c in LLM(device="cuda", tp=tp).generate(prompts, greedy)] for tp in (1, {tp})]
print("one rank:", found[0])
print("{tp} ranks:", "the same" if found[0] == found[1] else found[1])
"""


def list_parts(a: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The commands of each part."""
    bench = [sys.executable, "-m", "saccade.bench"]
    few = str(min(a.layers, LAYERS_OF_ONE))

    def ranks(command: str, tp: int, layers: str, *options: str) -> list[str]:
        out = str(Path(a.out) / f"{command}-v32-tp{tp}-layers{layers}.json")
        words = [*bench, command, "--shape", "v32", "--layers", layers, "--tp", str(tp), "--out", out, *options]
        return [*words, "--commit", a.commit] if a.commit else words

    decode = ("--batch", a.batch, "--context", "8192", "--speculate", "1", "--repeats", "5")
    prefill = ("--context", "8192", "--repeats", "3")
    tp, layers = int(a.tp), str(a.layers)
    sums = [*bench, "allreduce", "--tp", str(tp), "--out", str(Path(a.out) / f"allreduce-tp{tp}.json")]
    test = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "gpu", "tests/gpu/test_gpu_ranks.py"]
    text = [sys.executable, "-c", TEXT.format(tp=tp)]
    return {
        "allreduce": [[*sums, *(["--commit", a.commit] if a.commit else [])]],
        "tests": [test],
        "decode": [ranks("decode", 1, few, *decode), ranks("decode", tp, layers, *decode)],
        "prefill": [ranks("prefill", 1, few, *prefill), ranks("prefill", tp, layers, *prefill)],
        "steps": [[sys.executable, str(ROOT / "tests/helpers/ranks/gpu_rank_cases.py"), "start", str(tp), layers]],
        "text": [text],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.run_ranks", description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS_OF_ONE, help="of DeepSeek-V3.2, 1 to 61")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--only", help="parts, with commas")
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--commit", default="", help="of the sources, where there is no git")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of a command")
    a = parser.parse_args()
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", ".", "tests/helpers/ranks"))
    env = os.environ | MULTICAST_OFF | {"PYTHONPATH": path}
    failed, parts = [], list_parts(a)
    for part in a.only.split(",") if a.only else parts:
        for command in parts[part]:
            print(f"\n=== {part}: {' '.join(command[1:])}", flush=True)
            start = time.monotonic()
            try:
                code: int | str = subprocess.run(command, cwd=ROOT, env=env, timeout=a.limit).returncode
            except subprocess.TimeoutExpired:
                code = "time limit"
            print(f"=== {part}: {code} after {time.monotonic() - start:.0f} s", flush=True)
            failed += [part] if code else []
    print(f"\nfailed: {', '.join(failed) or 'nothing'}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
