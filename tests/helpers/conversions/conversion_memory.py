"""Peak memory of conversions of odd shapes, each beside the bound that is printed. `python conversion_memory.py FOLDER`: a line of
JSON for each. Run by test_convert_memory.py, in a process of its own: what it holds is that of conversions alone."""

import ctypes
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import small_config, small_tensors, write_small

from saccade.cli.convert import find_memory_use
from saccade.convert.changes import Mode
from saccade.convert.convert import convert


def write_rows(root: Path) -> None:
    """A matrix of many rows, each with scales of its own: as numbers, all of its scales would take 268 MB."""
    config = small_config(vocab_size=32, q_lora_rank=32768, num_hidden_layers=1, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(config).items() if "layers.1." not in n}
    for name in [n for n in given if n.endswith("weight_scale_inv")]:
        codes = name.removesuffix("_scale_inv")
        rows, columns = given[codes].shape
        del given[name]
        given[codes + "_scale"] = torch.full((rows, columns // 32), 127, dtype=torch.uint8)
    write_small(root, config, given)


def write_text(root: Path) -> None:
    """Text in a header and in the index, 16 MB each, and in config.json."""
    config = small_config(note="x" * (8 << 20))
    write_small(root, config, small_tensors(small_config()))
    for path in root.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "note": "\u00e4\\" * (4 << 20)})
    path = root / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": {"n": ["x" * 50] * 300_000}}))


def main(folder: Path) -> None:
    convert(None, folder / "warm", Mode("bf16"), threads=2)
    for write, threads in ((write_rows, 2), (write_text, 1)):
        write(folder / write.__name__)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = find_memory_use("VmRSS")
        report = convert(folder / write.__name__, folder / f"{write.__name__}-out", Mode("bf16"), threads)
        peak = find_memory_use("VmHWM")
        assert before is not None and peak is not None
        print(json.dumps({"shape": write.__name__, "peak": peak - before, "bound": report.memory_bound}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
