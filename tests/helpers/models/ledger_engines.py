"""An engine whose model is quick and sees all: what it makes of a token depends on every token of its request, read
through the page table out of a pool, as attention would. And what such engines are asked.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from random import Random

import torch
from byte_tokenizer import TOKENIZER

from saccade.engine.engine import Engine
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.ops.step import Cache

VOCAB, PRIME, END = 264, 9973, 10
TABLE = torch.randn(PRIME, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
TABLE[:, 256:] = -20.0  # special tokens


class Ledger:
    """Keeps each token where its cache row would be."""

    ops = None

    def __init__(self, pages):
        self.pool, self.forwards, self.fails_at = torch.zeros(pages * 64, dtype=torch.long), 0, None

    def forward(self, batch, cache, capture=None):
        self.forwards += 1
        if self.forwards == self.fails_at:
            raise RuntimeError("a launch failed")
        real = batch.slots >= 0
        self.pool[batch.slots[real]] = batch.tokens[real] + 1 + 500 * batch.rounds
        table = batch.page_table[batch.request]
        rows = (table[:, :, None] * 64 + torch.arange(64)).flatten(1)  # [T, positions]
        place = torch.arange(rows.shape[1])
        seen = torch.where(place <= batch.positions[:, None], self.pool[rows] * (7 * place + 11), 0)
        return (seen.sum(1) % PRIME)[:, None]

    def logits(self, rows):
        return TABLE[rows[:, 0]]


def build(pages=30, budget=96, requests=6, ahead="on", prefix=True, make=Engine, mixed=None, rounds=False):
    scheduler = Scheduler(pages, budget, requests, 400, PrefixKeys(b"ledger") if prefix else None, mixed, rounds)
    options = {"defaults": Defaults(eos_token_ids=(END,)), "tokenizer": TOKENIZER, "launch_ahead": ahead}
    return make(Ledger(pages), Cache((), ()), scheduler, VOCAB, **options)


def generate(prompt, params, rounds=False):
    """A request by itself, one step after the other. Log-probabilities have its tokens booked in the other of two
    ways: by `_accept`, not by the shorter `_take`."""
    engine = build(ahead="off", prefix=False, rounds=rounds)
    job = engine.add(prompt, replace(params, logprobs=params.logprobs or 0))
    while engine.jobs:
        engine.step()
    return job


def make_request(seed):
    """A prompt, of which many begin alike, and what is asked; now and then what a step ahead cannot serve."""
    dice = Random(seed)
    prompt = [*range(40, 40 + dice.choice((0, 64, 130))), *(dice.randrange(256) for _ in range(dice.randint(1, 70)))]
    special = dice.choice(({}, {}, {}, {}, {"logprobs": 2}, {"min_tokens": 1}, {"presence_penalty": 1.0}))
    stop = {} if dice.random() < 0.6 else {"stop": tuple(chr(dice.randrange(33, 127)) for _ in range(8))}
    return prompt, SamplingParams(
        max_tokens=dice.choice((1, 2, 9, 70)), temperature=dice.choice((0.0, 1.0)), seed=seed,
        ignore_eos=dice.random() < 0.5, **special, **stop,
    )  # fmt: skip


def judge(engine, asked, told):
    """What each job gave is what it gives alone; nothing is left."""
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    for (prompt, params), job in asked:
        text = "".join(update.text for update in told if update.job is job)
        tokens = [token for update in told if update.job is job for token in update.tokens]
        assert job.request.generated == tokens and job.text == text
        alone = generate(prompt, params, engine.scheduler.rounds)
        if job.finish_reason == "cancelled":
            assert alone.request.generated[: len(tokens)] == tokens and alone.text.startswith(text)
        else:
            assert (tokens, text) == (alone.request.generated, alone.text)
            assert (job.finish_reason, job.stop_reason) == (alone.finish_reason, alone.stop_reason)
            assert job.tally == alone.tally
            assert job.logprobs == (alone.logprobs if params.logprobs else [])


def watch_launches(engine):
    """Of each step, as they are launched: requests in it, and whether the one in front of it had not been read."""
    launched, launch = [], engine._launch

    def watch(drafts):
        before = len(engine._flights)
        launch(drafts)
        if len(engine._flights) > before:
            launched.append((len(engine._flights[-1].chunks), before > 0))

    engine._launch = watch
    return launched


class Told:
    """Rank 0's connection to another rank, which does at once what it is told."""

    def __init__(self, follower):
        self.follower, self.tracker = follower, self

    def check(self):
        pass

    def together(self, what):
        return nullcontext()

    def working(self):
        return nullcontext()

    def tell(self, head, payload):
        self.follower.enter(json.loads(json.dumps(head["events"])))
        self.follower.repeat(head["drafts"])
