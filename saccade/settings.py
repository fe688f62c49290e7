"""What a run is set to: every "auto" is resolved here, once, by a pure function, and can be printed.

Knows no torch: what the machine has is an argument. Next: llm.py asks the machine and shows the result.
"""

from dataclasses import dataclass, fields

from saccade.errors import ConfigError
from saccade.kernels import PAGE
from saccade.params import is_integer

DEFAULT_TOKENS = 32768  # cached tokens on a CPU, where memory is shared with everything else
DEFAULT_REQUESTS = 64
BATCH_TOKENS = {"cpu": 512, "cuda": 2048}  # of one step: a prefill chunk; enough to fill a CPU's cores, a GPU's SMs
CACHE_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of what the weights leave free; the rest is for activations and neighbours


@dataclass(frozen=True)
class Settings:
    """A run without anything left open. `print(settings)` shows one line a field."""

    path: str
    device: str
    dtype: str  # "auto" (as stored, else BF16) or "float32"
    mtp: bool  # whether the MTP layer is there
    max_length: int  # tokens of one request, prompt and answer
    cache_tokens: int  # of all requests together; a multiple of the page
    cache_bytes: int
    max_batch_tokens: int  # of one step
    max_requests: int  # that run at the same time

    @property
    def pages(self) -> int:
        """Pages of the cache, page 0 included."""
        return self.cache_tokens // PAGE + 1

    def __str__(self) -> str:
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{f.name:{width}}  {getattr(self, f.name)}" for f in fields(self))


def choose_device(device: str, has_cuda: bool) -> str:
    """ "auto" is the GPU if there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    kind = device.split(":")[0]
    if kind not in BATCH_TOKENS:
        raise ConfigError(f'device: expected "auto", "cpu", "cuda" or "cuda:<number>", found {device!r}')
    if kind == "cuda" and not has_cuda:
        raise ConfigError(f'device: {device!r} asked for, but torch finds no CUDA device here; use "cpu" or "auto"')
    return device


def resolve(
    *,
    path: str,
    device: str,
    dtype: str,
    mtp: bool,
    max_length: int,
    cache_tokens: int | None,
    max_batch_tokens: int | None,
    max_requests: int | None,
    free_bytes: int,
    weight_bytes: int,
    page_bytes: int,
) -> Settings:
    """Fill in what is None. `device` is chosen already; `page_bytes` is one page of the cache over all layers.

    The cache holds as many tokens as all requests could use, but no more than memory allows, and on a CPU no more
    than one context or 32,768. Raises ConfigError for a senseless number, or if not even one page fits.
    """
    for name, value in (
        ("cache_tokens", cache_tokens),
        ("max_batch_tokens", max_batch_tokens),
        ("max_requests", max_requests),
    ):
        if value is not None and not (is_integer(value) and value >= 1):
            raise ConfigError(f"{name}: expected an integer of at least 1, found {value!r}")
    kind = device.split(":")[0]
    max_requests = max_requests or DEFAULT_REQUESTS
    spare = free_bytes - weight_bytes
    if cache_tokens is None:
        wanted = min(max_length, DEFAULT_TOKENS) if kind == "cpu" else max_length * max_requests
        pages = min(-(-wanted // PAGE), int(spare * CACHE_SHARE[kind]) // page_bytes - 1)
    else:
        pages = -(-cache_tokens // PAGE)
    if pages < 1 or (pages + 1) * page_bytes > spare:
        raise ConfigError(
            f"device memory: {free_bytes:,} bytes are free on {device}; the weights need {weight_bytes:,} and a cache "
            f"of {max(pages, 1) * PAGE} tokens {(max(pages, 1) + 1) * page_bytes:,}: use a larger device or fewer "
            "cache_tokens"
        )
    return Settings(
        path=path,
        device=device,
        dtype=dtype,
        mtp=mtp,
        max_length=max_length,
        cache_tokens=pages * PAGE,
        cache_bytes=(pages + 1) * page_bytes,
        max_batch_tokens=max_batch_tokens or BATCH_TOKENS[kind],
        max_requests=max_requests,
    )
