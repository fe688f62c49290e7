"""What each rank holds and reads of published models: a table, from headers of full size without numbers.

    python -m tools.rank_table

CPU time of one core: planning and proving all ranks of a layout, headers read before. "Read" and "needed" are of the
rank that reads most: rows of matrices are read whole. "Once" is what one host with all ranks reads from its disk, if
no byte comes twice (parallel/abreast.py). Next: docs/ranks.md.
"""

import gc
import sys
import tempfile
import time
from pathlib import Path

from saccade.checkpoint.open import open_model
from saccade.models.parameters import Layout
from saccade.plan import make_plan, plan_all, prove_ranks
from saccade.plan.reads import count_needed_bytes, count_read_bytes
from saccade.plan.show import show_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers" / "checkpoints"))

from header_checkpoints import published, write_headers
from published_configs import deepseek_v32_config, glm5_config, glm52_config

MODELS = {
    "DeepSeek-V3.2": (deepseek_v32_config(), True),
    "GLM-5": (glm5_config(), False),
    "GLM-5.2": (glm52_config(), False),
}
LAYOUTS = ((8, 1), (8, 8), (16, 16))


def main() -> None:
    print("| model | ranks | proven, CPU | problems | device, most of a rank | read | needed | read / needed | once |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    gc.disable()  # as the command line does: no circles among millions of tuples
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, has_copies) in MODELS.items():
            path = write_headers(Path(folder) / name, config, published(config, has_copies))
            opened = open_model(path)
            for tp, ep in LAYOUTS:
                start = time.process_time()
                plans = plan_all(make_plan(*opened, Layout(tp, ep)))
                problems = prove_ranks(plans)
                seconds = time.process_time() - start
                read = max(count_read_bytes(plan) for plan in plans)
                needed = max(count_needed_bytes(plan) for plan in plans)
                once = sum(entry.stop - entry.start for entry in opened[1].entries.values())
                print(
                    f"| {name} | tp {tp}, ep {ep} | {seconds:.1f} s | {len(problems)} |"
                    f" {show_bytes(max(plan.device_bytes for plan in plans))} | {show_bytes(read)} |"
                    f" {show_bytes(needed)} | {read / needed:.2f} | {show_bytes(once)} |",
                    flush=True,
                )
                del plans
                gc.collect()


if __name__ == "__main__":
    main()
