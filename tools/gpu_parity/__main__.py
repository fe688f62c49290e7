"""The fast kernels against the reference on one GPU: same checkpoint, same storage, same precision of the cache.

`python -m tools.gpu_parity` asks held-out problems of up to 4,096 tokens and compares (a) log-probabilities where
the selection is the same; (b) what the kernels did not select, by the reference's attention on it; (c) greedy
text; (d) runs with each other, bit for bit. Decodes have 1 to 16 requests at a time. Next: saccade/ops/gpu.py.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saccade.api.llm import LLM
from saccade.bench.record import describe_run
from saccade.kernels import ACTIVATION_NAMES
from tools.gpu_parity.compare import find_bars, judge
from tools.gpu_parity.measure import draw_prompts, measure, measure_drafts


def show(result: dict[str, Any]) -> Iterator[str]:
    for name, value in result.items():
        if name == "greedy":
            yield f"  greedy: {len(value['parted'])} of {value['texts']} texts of {value['tokens']} tokens part"
            yield from (f"    {d}" for d in value["parted"])
        elif isinstance(value, dict):
            yield f"  {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        else:
            yield f"  {name}: {value}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the fast kernels with the reference on a GPU.")
    parser.add_argument("--model", default=None, help="a checkpoint; default: the bundled one")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="generated for each prompt")
    parser.add_argument("--longest", type=int, default=4030, help="tokens of a prompt")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no prompt is begun")
    parser.add_argument("--index-cache", action="append", choices=("bf16", "fp8"), help="default: both")
    parser.add_argument("--latent-cache", default="bf16", choices=("bf16", "fp8"), help="how latents are cached")
    parser.add_argument("--activations", default="exact", choices=ACTIVATION_NAMES, help="inputs of products")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: expected a CUDA device, found none")
    asked.out.mkdir(parents=True, exist_ok=True)
    for index_cache in asked.index_cache or ("bf16", "fp8"):
        start = time.perf_counter()
        record = describe_run(torch.device(asked.device))
        options = f"--prompts {asked.prompts} --tokens {asked.tokens} --longest {asked.longest}"
        options += f" --seconds {asked.seconds:g}" if math.isfinite(asked.seconds) else ""
        options += f" --latent-cache {asked.latent_cache}" if asked.latent_cache != "bf16" else ""
        options += f" --activations {asked.activations}" if asked.activations != "exact" else ""
        bars = find_bars(asked.activations)
        record |= {"command": f"python -m tools.gpu_parity {options} --index-cache {index_cache}"}
        record |= {"model": asked.model or "bundled", "dtype": "auto", "index_cache": index_cache}
        record |= {"latent_cache": asked.latent_cache, "activations": asked.activations, "bars": bars}
        pair = [
            LLM(
                asked.model,
                asked.device,
                index_cache=index_cache,
                kernels=kernels,
                prefix_cache=False,
                activations=asked.activations,
                latent_cache=asked.latent_cache,
            )  # fmt: skip
            for kernels in ("reference", "fast")
        ]
        prompts = draw_prompts(pair[0], asked.prompts, asked.longest)
        found = measure(pair[0], pair[1], prompts, asked.tokens, asked.seconds, bars["log_prob"])
        if pair[0].model.mtp is not None:
            found["drafts"] = measure_drafts(pair[0], pair[1], prompts[:6])
        found["holds"] = judge(found, bars)
        print(
            f"index cache {index_cache}, latents {asked.latent_cache}, activations {asked.activations}, "
            f"{record['device']}",
            *show(found),
            sep="\n",
            flush=True,
        )
        record |= found | {"seconds": time.perf_counter() - start}
        rounded = [asked.activations] if asked.activations != "exact" else []
        rounded += [f"{asked.latent_cache}-latents"] if asked.latent_cache != "bf16" else []
        model, device = Path(record["model"]).name, record["device"].split()[-1].lower()
        name = "-".join(["parity", model, index_cache, *rounded, device])
        (asked.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        del pair


if __name__ == "__main__":
    main()
