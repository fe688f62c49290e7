"""What this machine has, and how a model runs on it: plain torch, or the kernels of a GPU.

settings.py decides by what is found here. Knows no requests. Next: llm.py; fast.py and graphs.py, the fast way.
"""

from os import sysconf
from pathlib import Path

import torch

from saccade.config import ModelConfig
from saccade.engine import Model
from saccade.model.transformer import Transformer
from saccade.weights import Weights


def build_model(config: ModelConfig, weights: Weights, kernels: str) -> tuple[Transformer, Model, int]:
    """The model; what the engine runs, itself or a faster way of the same; the tokens of a step up to which that has
    few shapes. Triton is imported only where it is used."""
    if kernels == "reference":
        model = Transformer(config, weights)
        return model, model, 0
    from saccade.fast import MOST, FastModel
    from saccade.graphs import CapturedModel
    from saccade.kernels import gpu

    model = Transformer(config, weights, gpu)
    return model, CapturedModel(FastModel(model)), MOST


def find_capability(device: str) -> int:
    """Ten times a GPU's compute capability; 0 of a CPU."""
    if not device.startswith("cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def find_free_bytes(device: str) -> int:
    """Free memory of the device. On a CPU, what the system says could be had without swapping."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not Linux: half of what is built in
        return sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") // 2
