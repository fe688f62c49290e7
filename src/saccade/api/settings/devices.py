"""Which devices compute, how many ranks, and on which kernels. ConfigError for what is not there.

Knows no torch and no model: what the machine has is an argument. Next: resolve.py; loading/machine.py asks the machine.
"""

import re

from saccade.base.values import is_count, show
from saccade.errors import ConfigError

KERNELS = ("auto", "fast", "reference")
LEAST_CAPABILITY = 90  # ten times the compute capability: Hopper's

RANK_LIMIT = 1024  # of one model


def choose_device(device: str, cuda_count: int) -> str:
    """ "auto" is the GPU if there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return "cuda" if cuda_count else "cpu"
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", device):
        raise ConfigError(f'device: expected "auto", "cpu", "cuda" or "cuda:<number>", found {show(device)}')
    kind, _, number = device.partition(":")
    if kind == "cuda" and not cuda_count:
        raise ConfigError(f'device: {device!r} asked for, but torch finds no CUDA device here; use "cpu" or "auto"')
    if int(number or 0) >= max(cuda_count, 1):
        raise ConfigError(f"device: {device!r} asked for, but torch finds cuda:0 to cuda:{cuda_count - 1} here")
    return device


def choose_devices(device: str, cuda_count: int, ranks: int) -> list[str]:
    """The device of each rank of this machine: a GPU each, or the CPU for all. A list as in "cuda:4,cuda:5" names them;
    one that stands there twice is shared, which is slow and for tests. Raises ConfigError if there are too few."""
    if ranks == 1:
        return [choose_device(device, cuda_count)]
    if isinstance(device, str) and "," in device:
        named = [choose_device(name, cuda_count) for name in device.split(",")]
        if len(named) != ranks:
            raise ConfigError(
                f"device: expected one for each of the {ranks} ranks of this machine, found {show(device)}"
            )
        return named
    chosen = choose_device(device, cuda_count)
    if chosen == "cpu":
        return ["cpu"] * ranks
    if chosen != "cuda":
        raise ConfigError(
            f'device: {ranks} ranks of this machine need a GPU each, found {show(device)}; "cuda" gives them the first'
            f' {ranks}, a list as in "cuda:4,cuda:5" names them'
        )
    if ranks > cuda_count:
        raise ConfigError(
            f"tp: {ranks} ranks of this machine need a GPU each, torch finds {cuda_count} here; use a smaller tp, or"
            " several machines with torchrun"
        )
    return [f"cuda:{i}" for i in range(ranks)]


def check_ranks_asked(tp: object, ep: object, check_ranks: object) -> None:
    """ConfigError for numbers of ranks that make no sense for any model."""
    for name, value in (("tp", tp), ("ep", ep)):
        if not (is_count(value, 1) and value <= RANK_LIMIT):  # type: ignore[operator]
            raise ConfigError(f"{name}: expected a number of ranks from 1 to {RANK_LIMIT}, found {show(value)}")
    if not isinstance(check_ranks, bool):
        raise ConfigError(f"check_ranks: expected True or False, found {show(check_ranks)}")


def choose_kernels(kernels: str, device: str, dtype: str, capability: int) -> str:
    """ "auto" is "fast" where its kernels run: on a GPU of compute capability `capability` / 10, LEAST_CAPABILITY at
    least, and weights as they are stored. Raises ConfigError for "fast" elsewhere."""
    if not (isinstance(kernels, str) and kernels in KERNELS):
        raise ConfigError(f'kernels: expected "auto", "fast" or "reference", found {show(kernels)}')
    obstacle = ""
    if device.split(":")[0] != "cuda":
        obstacle = f"needs a CUDA device, found device {device!r}"
    elif dtype != "auto":
        obstacle = f'computes with weights as they are stored, dtype "auto", found dtype {show(dtype)}'
    elif capability < LEAST_CAPABILITY:
        obstacle = f"needs compute capability {LEAST_CAPABILITY / 10}, found {capability / 10} of {device}"
    if kernels == "fast" and obstacle:
        raise ConfigError(f'kernels: "fast" {obstacle}; use "auto" or "reference"')
    return "reference" if obstacle or kernels == "reference" else "fast"
