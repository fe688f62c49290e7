"""What a run is set to: every "auto" is resolved here, once, by a pure function, and can be printed.

Knows no torch: what the machine has is an argument. Next: llm.py asks the machine and shows the result.
"""

from dataclasses import dataclass, fields

from saccade.api.settings.step_sizes import BATCH_TOKENS, choose_mixed_tokens
from saccade.base.values import is_count, show
from saccade.checkpoint.index import Index
from saccade.config.file import Config
from saccade.engine.pace import check_speculate
from saccade.engine.steps.ahead import choose_launch_ahead
from saccade.errors import ConfigError, LoadError
from saccade.kernels import ACTIVATION_NAMES, PAGE
from saccade.models.registry import Family
from saccade.plan.names import find_layer_prefix

DEFAULT_REQUESTS = 64
CACHE_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of what the weights leave free; the rest is for activations and neighbours
# By default a CPU's cache takes less, because memory there is shared with everything else: a quarter, unless one
# context of up to so many tokens needs more.
DEFAULT_SHARE, LEAST_TOKENS = 0.25, 32768
STATE_SHARE = 0.5  # of that, for states of requests that run at the same time; the rest is for pages

SETTING_LIMITS = {  # beyond these a step's buffers, not the work, would fill the memory
    "cache_tokens": 2**40,
    "max_batch_tokens": 2**20,  # 40 MB of token ids, positions and places
    "max_mixed_tokens": 2**20,
    "max_requests": 2**14,  # 340 MB of page tables at a context of 163,840
}


@dataclass(frozen=True)
class Settings:
    """A run without anything left open. `print(settings)` shows one line a field."""

    path: str
    device: str
    dtype: str  # "auto" (as stored, else BF16) or "float32"
    kernels: str  # "fast" or "reference"
    mtp: bool  # whether the MTP layer is there
    index_cache: str  # "bf16" (numbers of the dtype) or "fp8"
    latent_cache: str  # the same of latents
    activations: str  # what products of long prompts see of their inputs: "exact", "bf16" or "fp8"
    max_length: int  # tokens of one request, prompt and answer
    cache_tokens: int  # of all requests together; a multiple of the page
    cache_bytes: int  # states included, of as many requests as may run
    max_batch_tokens: int  # of one step
    max_mixed_tokens: int  # of a step in which some requests decode beside prompts
    max_requests: int  # that run at the same time
    threads: int = 1  # that compute on a CPU, in the whole process
    speculate: int | str = 0  # drafts a step, or "auto": chosen while it runs
    prefix_cache: bool = True  # whether pages are kept for requests that begin with the same tokens
    tp: int = 1  # ranks that share the model
    ep: int = 1  # ranks that divide the experts among them
    check_ranks: bool = False  # whether what they compute is compared
    launch_ahead: str = "off"  # steps before the last one is read: "on", "off", or "auto": where many decode
    state_bytes: int = 0  # of cache_bytes: what requests keep besides rows of pages
    notes: tuple[str, ...] = ()  # what the checkpoint recommends and does not get

    @property
    def pages(self) -> int:
        """Pages of the cache, page 0 included."""
        return self.cache_tokens // PAGE + 1

    def __str__(self) -> str:
        names = [f.name for f in fields(self) if f.name != "notes"]
        width = max(len(name) for name in names)
        return "\n".join([*(f"{name:{width}}  {getattr(self, name)}" for name in names), *self.notes])


def choose_activations(activations: object, dtype: str, kernels: str) -> str:
    """One of ACTIVATION_NAMES. "auto": as published checkpoints say, "fp8" (config.json's activation_scheme "dynamic"),
    where that is faster, so by kernels; "exact" in plain torch and in "float32". ConfigError for an unknown name, or
    for rounding that numbers in FP32 were asked not to have."""
    if activations == "auto":
        return "fp8" if kernels == "fast" and dtype == "auto" else "exact"
    if not (isinstance(activations, str) and activations in ACTIVATION_NAMES):
        raise ConfigError(f'activations: expected "auto", "exact", "bf16" or "fp8", found {show(activations)}')
    if activations != "exact" and dtype == "float32":
        raise ConfigError(
            f'activations: "{activations}" rounds inputs of products, dtype "float32" rounds nothing; use dtype "auto"'
        )
    return activations


def find_mtp(config: Config, index: Index) -> tuple[bool, str, int | None]:
    """Whether the files have tensors of the MTP layer, what their names begin with, and how many such layers
    config.json declares."""
    prefix = find_layer_prefix(config, index.entries, config.num_hidden_layers)
    return any(name.startswith(prefix) for name in index.entries), prefix, config.num_nextn_predict_layers


def choose_speculate(
    speculate: object, mtp: bool, is_shipped: bool, prefix: str, declared: int | None
) -> tuple[int | str, tuple[str, ...]]:
    """Drafts a step, or "auto", and a note. They come from the MTP layer, `prefix` in the files: `mtp` says whether it
    was asked for, `is_shipped` whether the files have tensors of it, `declared` how many config.json speaks of.

    ConfigError for a senseless value; LoadError if drafts are asked for that nothing can make.
    """
    asked = check_speculate(speculate)
    if asked == 0 or (mtp and is_shipped):
        return asked, ()
    obstacle = f"no file has a tensor of it ({prefix}*)" if mtp else "mtp=False leaves it out"
    if asked == "auto":
        return 0, (f'speculate: "auto" is 0: drafts come from the MTP layer, and {obstacle}',)
    if not mtp:
        raise ConfigError(f"speculate: {asked} drafts a step come from the MTP layer, but {obstacle}")
    says = "says nothing of one" if declared is None else f"says num_nextn_predict_layers={declared}"
    raise LoadError(
        f"speculate: {asked} drafts a step come from the MTP layer, but {obstacle}; config.json {says}. It is often "
        "published apart: put its .safetensors file beside the others, or run without speculate"
    )


def require_family(
    family: Family, has_states: bool, kernels: str, asked: str, speculate: int | str, obstacle: str = ""
) -> tuple[str, int | str, tuple[str, ...]]:
    """`kernels` and `speculate` as far as a family can, and notes. `asked`: the kernels that the user asked for;
    `obstacle`: why the family's do not take this model. ConfigError if the user asked for what the family cannot."""
    notes: tuple[str, ...] = ()
    if kernels == "fast" and family.gpu is None:
        if asked == "fast":
            raise ConfigError(f'kernels: "fast": {family.name} has no kernels; use "auto" or "reference"')
        kernels = "reference"
    if kernels == "fast" and obstacle:
        if asked == "fast":
            raise ConfigError(f'kernels: "fast": {obstacle}; use "auto" or "reference"')
        kernels, notes = "reference", (f'kernels: "auto" is "reference": {obstacle}',)
    if speculate and has_states and not family.takes_back:
        why = f"the states of {family.name} cannot be rolled back behind a draft that is refused"
        if speculate != "auto":
            raise ConfigError(f"speculate: {speculate} drafts a step were asked for, but {why}; run without speculate")
        speculate, notes = 0, (*notes, f'speculate: "auto" is 0: {why}')
    return kernels, speculate, notes


def choose_prefix_cache(prefix_cache: object, family: str, has_states: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether pages are kept, and a note. ConfigError for a senseless value, or if it was asked for in vain: a state
    holds what all tokens of a request made of it, so pages alone do not save computing them."""
    if not isinstance(prefix_cache, bool) and not (isinstance(prefix_cache, str) and prefix_cache == "auto"):
        raise ConfigError(f'prefix_cache: expected True, False or "auto", found {show(prefix_cache)}')
    if not has_states:
        return bool(prefix_cache), ()
    why = f"the states of {family} are not in pages, and would have to be computed all the same"
    if prefix_cache is True:
        raise ConfigError(f'prefix_cache: True was asked for, but {why}; use "auto" or False')
    return False, (f'prefix_cache: "auto" is False: {why}',) if prefix_cache else ()


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
    state_bytes: int = 0,
    index_cache: str = "bf16",
    latent_cache: str = "bf16",
    activations: str = "exact",
    kernels: str = "reference",
    threads: int = 1,
    speculate: int | str = 0,
    prefix_cache: bool = True,
    tp: int = 1,
    ep: int = 1,
    check_ranks: bool = False,
    max_mixed_tokens: int | None = None,
    launch_ahead: str = "auto",
    active: int = 0,
    notes: tuple[str, ...] = (),
) -> Settings:
    """Fill in what is None. `device` and `kernels` are chosen already; `page_bytes`: of one page over all layers;
    `state_bytes`: of one request's states; `active`: parameters that a token meets on this rank.

    The cache holds as many tokens as all requests could use, but no more than memory allows; on a CPU no more than
    DEFAULT_SHARE of it, or one context of up to LEAST_TOKENS if that is more. By default as many requests run as there
    is room for their states. Raises ConfigError for a senseless number, or if not even one page fits.
    """
    for name, value in (
        ("cache_tokens", cache_tokens),
        ("max_batch_tokens", max_batch_tokens),
        ("max_mixed_tokens", max_mixed_tokens),
        ("max_requests", max_requests),
    ):
        if value is not None and not (is_count(value, 1) and value <= SETTING_LIMITS[name]):
            raise ConfigError(
                f"{name}: expected an integer of at least 1 and at most {SETTING_LIMITS[name]:,}, found {show(value)}"
            )
    kind, page_bytes = device.split(":")[0], max(1, page_bytes)  # a model of recurrent layers alone keeps no rows
    left, share = free_bytes - weight_bytes, CACHE_SHARE[kind]
    asked = max_requests
    if max_requests is None and state_bytes:
        room = int(left * share * STATE_SHARE) // state_bytes - 1
        max_requests = max(1, min(room, DEFAULT_REQUESTS))
        if max_requests < DEFAULT_REQUESTS:
            why = f"each has {state_bytes:,} bytes of states"
            notes += (f"max_requests: {max_requests} is the default here, not {DEFAULT_REQUESTS}: {why}",)
    max_requests = int(max_requests or DEFAULT_REQUESTS)  # numpy's integers would wrap
    states = (max_requests + 1) * state_bytes
    spare = left - states
    most = int(spare * share) if asked else int(left * share) - states  # who asks for states may have more
    if cache_tokens is None:
        wanted = -(-max_length * max_requests // PAGE)
        if kind == "cpu":
            usual = (int(left * DEFAULT_SHARE) - states) // page_bytes - 1
            wanted = min(wanted, max(-(-min(max_length, LEAST_TOKENS) // PAGE), usual))
        pages = min(wanted, most // page_bytes - 1)
    else:
        pages = -(-int(cache_tokens) // PAGE)
    if pages < 1 or (pages + 1) * page_bytes > spare:
        raise ConfigError(
            f"device memory: {free_bytes:,} bytes are free on {device}; the weights need {weight_bytes:,} and a cache "
            f"of {max(pages, 1) * PAGE} tokens {(max(pages, 1) + 1) * page_bytes + states:,}: use a larger device or "
            f"fewer cache_tokens{' or max_requests' if states else ''}"
        )
    batch_tokens = int(max_batch_tokens or BATCH_TOKENS[kind])
    mixed_tokens = max_mixed_tokens or choose_mixed_tokens(kind, active, activations, batch_tokens)
    return Settings(
        path=path,
        device=device,
        dtype=dtype,
        kernels=kernels,
        mtp=mtp,
        index_cache=index_cache,
        latent_cache=latent_cache,
        activations=activations,
        max_length=max_length,
        cache_tokens=pages * PAGE,
        cache_bytes=(pages + 1) * page_bytes + states,
        max_batch_tokens=batch_tokens,
        max_mixed_tokens=min(int(mixed_tokens), batch_tokens),
        max_requests=max_requests,
        threads=threads,
        speculate=speculate,
        prefix_cache=prefix_cache,
        tp=tp,
        ep=ep,
        check_ranks=check_ranks,
        launch_ahead=choose_launch_ahead(launch_ahead, kind),
        state_bytes=states,
        notes=notes,
    )
