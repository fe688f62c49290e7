"""All that can refuse a model or a request, before its weights are fetched or loaded.

From config, headers and tokenizer files alone: the architecture, the plan, the device, the memory, a prompt. Of an id
only those are fetched so far. Next: llm.py, which loads what was prepared.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from saccade.api.loading.machine import find_capability, find_free_bytes
from saccade.api.loading.side_files import SideFiles, read_side_files
from saccade.api.settings.conflicts import find_conflicts
from saccade.api.settings.devices import check_ranks_asked, choose_devices, choose_kernels
from saccade.api.settings.resolve import (
    Settings,
    choose_activations,
    choose_prefix_cache,
    choose_speculate,
    find_mtp,
    require_family,
    resolve,
)
from saccade.api.settings.threads import find_threads
from saccade.base.values import show
from saccade.checkpoint.hub.fetch import Progress, Source, fetch_weights, open_source
from saccade.checkpoint.open import open_model
from saccade.config.file import Config
from saccade.engine.pace import check_speculate
from saccade.engine.pages import count_page_bytes
from saccade.engine.params import SamplingParams
from saccade.engine.sampling.grammar import Grammars
from saccade.engine.scheduling.lengths import Limits
from saccade.engine.steps.ahead import check_launch_ahead
from saccade.errors import ConfigError, PlanError, RequestError
from saccade.kernels import PAGE
from saccade.models.cache_rows import EXPANDED_BYTES, check_caches, count_state_bytes
from saccade.models.parameters import Layout
from saccade.models.registry import fetch_place, find_cache_rows, find_family
from saccade.parallel.place import RankPlace, choose_place
from saccade.plan import Plan, make_plan, require
from saccade.plan.active import count_active_numbers
from saccade.plan.names import find_layer_prefix
from saccade.text.tokenizer import require_tokenizer

SERVE = "saccade.api.loading.rank:serve_torchrun"  # what other ranks do, which prepare and load as this one


@dataclass(frozen=True)
class PreparedModel:
    """A model that may be loaded: every setting is resolved, and everything but the weights is on this machine."""

    source: Source
    config: Config
    plan: Plan
    side: SideFiles
    settings: Settings
    place: RankPlace  # the rank that this process is
    options: dict[str, Any]  # as they were given, for the other ranks
    page_bytes: int  # of a page of the cache over all layers

    def with_cache(self, tokens: int) -> "PreparedModel":
        """The same with a cache of so many tokens, a multiple of the page."""
        s = self.settings
        size = s.cache_bytes - (s.cache_tokens - tokens) // PAGE * self.page_bytes
        others = s.notes[: len(s.notes) - len(list_conflicts(s, self.options))]
        resized = replace(s, cache_tokens=tokens, cache_bytes=size, notes=others)
        return replace(self, settings=note_conflicts(resized, self.options))

    def fetch(self, progress: Progress | None = None) -> "PreparedModel":
        """The same with its weights on this machine; `progress` is told bytes. What came is planned anew, from the
        files themselves. CheckpointError if they cannot be had."""
        if not self.source.missing:
            return self
        root = fetch_weights(self.source, progress)
        config, index = open_model(root)
        plan = make_plan(config, index, self.plan.layout, self.settings.dtype, self.settings.mtp)
        source = replace(self.source, index=index, missing=())
        return replace(self, source=source, plan=plan)

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a text, or those given; RequestError without a tokenizer, or for text it cannot encode."""
        if not isinstance(prompt, str):
            return prompt
        tokens = require_tokenizer(self.side.tokenizer, "a text prompt", self.side.obstacle).encode(prompt)
        if not tokens:
            raise RequestError("the prompt is empty; expected at least one token")
        return tokens

    def check(self, tokens: Sequence[int], params: SamplingParams | None = None) -> None:
        """RequestError for a prompt that the loaded model could not serve: too long, or with unknown tokens."""
        if params is not None and params.stop:
            require_tokenizer(self.side.tokenizer, "stop strings: finding them", self.side.obstacle)
        if params is not None:
            params.check_tokens(self.config.vocab_size)
        if params is not None and params.constraint is not None:
            self._grammars.compile(params.constraint)
        self._check_tokens(tokens)
        self._limits.find_length(len(tokens), None if params is None else params.max_tokens)

    def check_scoring(self, tokens: Sequence[int]) -> None:
        """RequestError for tokens that the loaded model could not score."""
        self._check_tokens(tokens)
        if len(tokens) > 1:
            self._limits.check_scored(len(tokens))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        size = self.config.vocab_size
        for place, token in enumerate(tokens):
            if not 0 <= token < size:
                text = f"token {show(token)} at place {place} is not in the vocabulary; ids are 0 to {size - 1}"
                raise RequestError(text)

    @cached_property
    def _grammars(self) -> Grammars:
        side = self.side
        return Grammars(side.tokenizer, self.config.vocab_size, side.defaults.eos_token_ids, side.obstacle)

    @cached_property
    def _limits(self) -> Limits:
        return Limits.of(self.settings.max_length, self.settings.pages)


def prepare(
    path: str | PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    mtp: bool = True,
    cache_tokens: int | None = None,
    max_batch_tokens: int | None = None,
    max_requests: int | None = None,
    index_cache: str = "bf16",
    kernels: str = "auto",
    speculate: int | str = 0,
    revision: str | None = None,
    threads: int | None = None,
    prefix_cache: bool | str = "auto",
    tp: int = 1,
    ep: int = 1,
    check_ranks: bool = False,
    activations: str = "auto",
    latent_cache: str = "bf16",
    max_mixed_tokens: int | None = None,
    launch_ahead: str = "auto",
    place: RankPlace | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> PreparedModel:
    """Resolve all settings of a model. Arguments as for `LLM`; `place`: which rank this is; None: found
    out, and a rank other than 0 that torchrun has started serves rank 0 here and ends the process. `tell` hears of long
    waits and of a cache that is used in place of the Hub. Raises what `LLM` raises, but for what only the weights'
    bytes can show."""
    options = {
        "path": None if path is None else str(path), "device": device, "dtype": dtype, "mtp": mtp,
        "cache_tokens": cache_tokens, "max_batch_tokens": max_batch_tokens, "max_requests": max_requests,
        "index_cache": index_cache, "kernels": kernels, "speculate": speculate, "revision": revision,
        "threads": threads, "prefix_cache": prefix_cache, "tp": tp, "ep": ep, "check_ranks": check_ranks,
        "activations": activations, "latent_cache": latent_cache, "max_mixed_tokens": max_mixed_tokens,
        "launch_ahead": launch_ahead,
    }  # fmt: skip
    if not (path is None or isinstance(path, str | PathLike)):
        raise ConfigError(f"model: expected a str, a Path or None, found {show(path)}")
    check_ranks_asked(tp, ep, check_ranks)
    if place is None:
        place = choose_place(tp, os.environ)
        if place.rank > 0:
            fetch_place(SERVE)(place, options)  # never comes back
    layout = Layout(tp, ep, place.rank)
    devices = choose_devices(device, torch.cuda.device_count() if torch.cuda.is_available() else 0, place.local_ranks)
    device = devices[place.local_rank]
    sharers = devices.count(device)
    chosen = choose_kernels(kernels, device, dtype, find_capability(device))
    check_caches(index_cache, latent_cache)
    choose_activations(activations, dtype, chosen)
    check_speculate(speculate)
    check_launch_ahead(launch_ahead)
    source = open_source(Path(path) if isinstance(path, PathLike) else path, revision, tell)
    config = source.config
    side = read_side_files(source.directory, config.eos_token_ids, config.vocab_size)
    plan = make_plan(config, source.index, layout, dtype, mtp)
    source = source.keep(plan.index)
    try:
        require(plan)  # `load` does so too, but only after the weights have come
    except PlanError as error:
        raise explain_mtp(error, plan) from None
    family, states = find_family(config.model_type), count_state_bytes(find_cache_rows(config, plan.has_mtp, layout))
    obstacle = family.find_gpu_obstacle(config)
    chosen, speculate, notes = require_family(family, states > 0, chosen, kernels, check_speculate(speculate), obstacle)
    keeps, unkept = choose_prefix_cache(prefix_cache, family.name, states > 0)
    asked = choose_speculate(speculate, mtp, *find_mtp(config, source.index))
    page_bytes = count_page_bytes(config, dtype, plan.has_mtp, index_cache, latent_cache)
    settings = resolve(
        path=str(source.root),
        device=device,
        dtype=dtype,
        mtp=plan.has_mtp,
        max_length=config.max_position_embeddings,
        cache_tokens=cache_tokens,
        max_batch_tokens=max_batch_tokens,
        max_mixed_tokens=max_mixed_tokens,
        launch_ahead=launch_ahead,
        active=count_active_numbers(plan),
        max_requests=max_requests,
        free_bytes=find_free_bytes(device) // sharers - EXPANDED_BYTES * (chosen == "fast"),
        weight_bytes=plan.device_bytes,
        page_bytes=page_bytes,
        state_bytes=states,
        index_cache=index_cache,
        latent_cache=latent_cache,
        activations=choose_activations(activations, dtype, chosen),
        kernels=chosen,
        threads=find_threads(torch.get_num_threads(), threads, plan, device, sharers),
        speculate=asked[0],
        prefix_cache=keeps,
        tp=tp,
        ep=ep,
        check_ranks=check_ranks and tp > 1,
        notes=config.notes + side.notes + asked[1] + notes + unkept,
    )
    settings = note_conflicts(settings, options)
    return PreparedModel(source, config, plan, side, settings, place, options, page_bytes)


def list_conflicts(settings: Settings, options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(find_conflicts(settings, options))


def note_conflicts(settings: Settings, options: dict[str, Any]) -> Settings:
    """The same with a note on each conflict, behind all other notes."""
    return replace(settings, notes=(*settings.notes, *list_conflicts(settings, options)))


def explain_mtp(error: PlanError, plan: Plan) -> PlanError:
    """The same error; if every problem is the MTP layer's, with the way to run without it."""
    prefix = find_layer_prefix(plan.config, plan.index.entries, plan.config.num_hidden_layers)
    if not error.problems or not all(problem.name.startswith(prefix) for problem in error.problems):
        return error
    text = f"{error}\nall of it concerns the MTP layer, which only makes drafts: mtp=False (--no-mtp) runs without it"
    return PlanError(text, error.problems)
