"""A prepared model becomes a loaded one: weights, forward pass, cache and engine, on one rank or several.

Knows no prompt and no answer. Next: prepare.py, what comes before; machine.py, start_ranks.py; llm.py asks the engine.
"""

from collections.abc import Callable
from functools import partial
from weakref import finalize

import torch

from saccade.api.compiling.beside import compile_beside
from saccade.api.loading.machine import build_model, compare_ranks
from saccade.api.loading.prepare import PreparedModel, explain_mtp
from saccade.api.loading.start_ranks import checking, start_ranks
from saccade.api.settings.threads import set_threads
from saccade.base.memory import naming_memory
from saccade.engine.causes import Causes
from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.ranks.replicate import FollowEngine, LeadEngine
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.prefix_keys import PrefixKeys, make_root
from saccade.engine.shared import SharedEngine
from saccade.engine.speculate import name_kernels
from saccade.errors import PlanError
from saccade.ops.device import on
from saccade.parallel.abreast import Abreast
from saccade.parallel.lead import Lead
from saccade.parallel.ranks import ONE_RANK, Ranks
from saccade.weights.loader import load


class LoadedModel:
    """A model on its device, its engine, and the processes beside it: other ranks, and those that compile. They end
    with it, at the latest with the last reference."""

    def __init__(
        self,
        prepared: PreparedModel,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
        make_engine: Callable[..., Engine] = Engine,
        abreast: Abreast | None = None,
    ) -> None:
        """Fetch and load it; what is raised leaves nothing behind. The arguments are those of `LLM.of`."""
        self.lead: Lead | None = None
        self.compiling = compile_beside(prepared)
        if self.compiling is not None:
            finalize(self, self.compiling.end)
        try:
            self._open_ranks(prepared.fetch(progress), progress, ranks, make_engine, abreast)
        except BaseException:
            if self.compiling is not None:
                self.compiling.end()
            raise

    def _open_ranks(
        self,
        prepared: PreparedModel,
        progress: Callable[[int, int], None] | None,
        ranks: Ranks | None,
        make_engine: Callable[..., Engine],
        abreast: Abreast | None,
    ) -> None:
        if ranks is not None or prepared.settings.tp == 1:
            self._load(prepared, progress, ranks or ONE_RANK, make_engine, abreast)
            return
        started = start_ranks(prepared)
        lead = self.lead = started.lead
        try:
            with lead.together("loading"):
                prepared, joined = started.join(prepared)
                told = checking(lead, progress)
                self._load(prepared, told, joined, partial(LeadEngine, lead, joined), started.read_abreast())
                started.settle()
        except BaseException:
            lead.close()
            raise
        finalize(self, lead.close)

    def _load(
        self,
        prepared: PreparedModel,
        progress: Callable[[int, int], None] | None,
        ranks: Ranks,
        make_engine: Callable[..., Engine],
        abreast: Abreast | None,
    ) -> None:
        config, plan, s, side = prepared.config, prepared.plan, prepared.settings, prepared.side
        device = s.device
        smaller = "use a larger device or fewer cache_tokens"
        try:
            with naming_memory(f"the weights ({plan.device_bytes:,} bytes on {device})", "use a larger device"):
                weights = load(plan, device, progress=progress, abreast=abreast)
        except PlanError as error:
            raise explain_mtp(error, plan) from None
        self.prepared, self.held = prepared, weights.held
        with naming_memory(f"the model on {device}", smaller), on(device):
            built = build_model(config, weights, s.kernels, bool(s.speculate), ranks, s.activations)
        weights.finish()
        if s.check_ranks:
            built, compared = compare_ranks(built, weights.held, ranks)
        set_threads(torch, s.threads)
        self.model = built.model
        what = f"the cache of {s.cache_tokens:,} tokens ({s.cache_bytes:,} bytes on {device})"
        with naming_memory(what, "ask for fewer cache_tokens (--cache-tokens)"):
            cache = allocate_cache(
                config, s.pages, s.dtype, device, s.mtp, s.index_cache, s.max_requests, plan.layout, s.latent_cache
            )
        root = make_root(config, plan.stored, s.dtype, s.index_cache, s.latent_cache, s.activations, s.kernels)
        keys = PrefixKeys(root, bool(s.speculate))
        keeps = keys if s.prefix_cache else None
        scheduler = Scheduler(
            s.pages, s.max_batch_tokens, s.max_requests, s.max_length, keeps, s.max_mixed_tokens,
            rounds=s.activations != "exact",
        )  # fmt: skip
        told = (config.vocab_size, device, side.defaults, side.tokenizer, built.small, built.run_drafts, s.speculate)
        with naming_memory("the buffers of a step", "ask for fewer max_requests or max_batch_tokens"):
            self.engine = make_engine(
                built.runner, cache, scheduler, *told, Causes(built.model, self.held, built.plain), s.launch_ahead
            )
        if s.check_ranks and isinstance(self.engine, LeadEngine | FollowEngine):
            self.engine.compared = compared
        self.kernels_of_drafts = "" if built.run_drafts is None else name_kernels(built.run_drafts)
        self.engine.no_text = side.obstacle
        self.shared = SharedEngine(self.engine)

    def close(self) -> None:
        """End the processes beside it. What is asked of several ranks from now on ends with RankError."""
        if self.compiling is not None:
            self.compiling.end()
        if self.lead is not None:
            self.lead.close()
