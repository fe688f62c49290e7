"""Engines of a tiny model that drafts, and two layers that draft in place of its MTP layer: one that guesses well, one
that knows what is coming."""

from dataclasses import replace

import torch
from tiny_models import assemble, tiny_config, tiny_tensors

from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.scheduler import Scheduler
from saccade.engine.speculate import Drafter, EagerDrafts
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference

CONFIG = tiny_config(vocab_size=264, num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=512)
SHARING = replace(CONFIG, index_share_for_mtp_iteration=True)
MODELS = {c: Transformer(c, assemble(c, tiny_tensors(c)), Reference()) for c in (CONFIG, SHARING)}
MODEL = MODELS[CONFIG]


class Shifted:
    """Guesses well: the main model, on a text that lacks its first token. Its cache is its own; what it knows of a
    place is what the MTP layer is told, so wrong books make it guess badly."""

    def __init__(self, pages):
        self.cache = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=False)

    def forward(self, batch, next_tokens, hidden, cache, selection=None):
        state = MODEL.forward(replace(batch, tokens=next_tokens), self.cache)
        return state, batch.positions[:, None].int()

    def logits(self, rows):
        return MODEL.logits(rows)


class Oracle:
    """Knows what is coming: `text`, the prompt and the answer of the only request."""

    def __init__(self, text, wrong=()):
        """`wrong`: places at which it guesses another token."""
        self.text = torch.tensor([*text, *[0] * 20])
        for place in wrong:
            self.text[place] = (self.text[place] + 1) % 256

    def forward(self, batch, next_tokens, hidden, cache, selection=None):
        return batch.positions[:, None].float(), batch.positions[:, None].int()

    def logits(self, rows):
        return torch.nn.functional.one_hot(self.text[rows[:, 0].long() + 2], CONFIG.vocab_size).float()


def build(speculate=0, pages=40, config=CONFIG, layer=None, max_batch_tokens=96, mixed=None, **options):
    scheduler = Scheduler(pages, max_batch_tokens, 16, CONFIG.max_position_embeddings, max_mixed_tokens=mixed)
    cache = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=True)
    model = MODELS[config]
    drafter = Drafter(model, layer or model.mtp, config.index_share_for_mtp_iteration, config.max_position_embeddings)
    options = {"speculate": speculate, "run_drafts": EagerDrafts(drafter)} | options
    return Engine(model, cache, scheduler, CONFIG.vocab_size, **options)


def run(engine, wants):
    jobs = [engine.add(*want) for want in wants]
    while engine.jobs:
        engine.step()
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    return jobs


def make_prompt(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tell(jobs):
    return [(job.request.tokens, job.text, job.finish_reason) for job in jobs]
