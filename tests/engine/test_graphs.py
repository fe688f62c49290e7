"""Which steps are captured and replayed, with a model and a recorder that only count; tests/gpu/test_gpu.py has real ones."""

from typing import Any

import pytest
import torch
from tiny_models import assemble, step_batch, tiny_config, tiny_tensors

from saccade.api.loading.machine import build_model, make_drafter
from saccade.engine.buffers import Buffers, Run
from saccade.engine.engine import Engine
from saccade.engine.graphs import MOST_CAPTURED, CapturedDrafts, CapturedModel
from saccade.engine.pages import allocate_cache
from saccade.engine.params import SamplingParams
from saccade.engine.sample import ChoiceKind, Packed, Row, Spec
from saccade.engine.scheduler import Scheduler
from saccade.engine.speculate import Drafter, EagerDrafts, StepKind, name_kernels
from saccade.engine.steps.recordings import Recording
from saccade.models.dsa.transformer import Transformer
from saccade.ops.gpu import Gpu
from saccade.ops.reference import Reference
from saccade.ops.step import Batch


def make_empty(result: Any) -> Any:
    """Tensors, alone or in a `Packed`, that nothing has been written to."""
    if isinstance(result, Packed):
        return result._replace(flat=torch.full_like(result.flat, -9), tokens=torch.zeros_like(result.tokens))
    return torch.empty_like(result)


def fill(kept: Any, new: Any) -> None:
    if isinstance(kept, Packed):
        kept.flat.copy_(new.flat)
        kept.tokens.copy_(new.tokens)
    else:
        kept.copy_(new)


class Counted:
    """A model that runs, and whose recordings run again into the same tensor."""

    def __init__(self, model: Any = None) -> None:
        self.model, self.config, self.mtp, self.ops = model, None, None, None
        self.done: list[str] = []

    def forward(self, batch: Batch, cache: Any, capture: list[torch.Tensor] | None = None) -> torch.Tensor:
        self.done.append("run")
        if self.model is None:
            return batch.tokens.float()
        hidden: torch.Tensor = self.model.forward(batch, cache, capture)
        return hidden

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.logits(rows)
        return logits

    def record(self, run: Any, pool: Any) -> Recording:
        result = run()
        first, selected = result if type(result) is tuple else (result, None)
        kept = make_empty(first)
        self.done[-1] = "record"  # what a graph records has not run
        if selected is not None:
            selected.packed.fill_(-1)

        def replay() -> None:
            new = run()
            fill(kept, new if selected is None else new[0])
            assert selected is None or new[1].packed.data_ptr() == selected.packed.data_ptr()
            self.done[-1] = "replay"

        return Recording(replay, kept if selected is None else (kept, selected))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 1))
    return Counted()


def capture(counted: Counted, most: int = 64) -> CapturedModel:
    return CapturedModel(counted, most, counted.record, mixed=16)  # type: ignore[arg-type]


def test_the_second_step_of_a_batch_is_recorded_and_later_ones_are_replayed(counted: Counted) -> None:
    model, cache = capture(counted), object()
    buffers = Buffers("cpu", 64, 4, 4, small=MOST_CAPTURED)
    results = []
    for token in (3, 4, 5):
        results.append(model.forward(buffers.fill([Run([token], 0, [1], 1)]), cache).tolist())  # type: ignore[arg-type]
    assert counted.done == ["run", "record", "replay", "replay"] and results == [[3.0], [4.0], [5.0]]


def test_steps_of_many_requests_are_recorded_and_prompts_among_them_are_not(counted: Counted) -> None:
    model, cache = capture(counted), object()
    buffers = Buffers("cpu", 400, 300, 4, small=MOST_CAPTURED)
    for count in (20, 24, 250, 250, 300, 300):  # 20 and 24 requests are one size
        runs = [Run([5], 0, [1], 1)] * count
        model.forward(buffers.fill(runs), cache)  # type: ignore[arg-type]
    assert counted.done == ["run", "record", "replay", "run", "record", "replay", "run", "run"]
    counted.done.clear()
    for _ in range(2):
        model.forward(buffers.fill([Run([5] * 30, 0, [1], 1), *runs[:20]]), cache)  # type: ignore[arg-type]
    assert counted.done == ["run", "run"]


def test_steps_with_prompts_are_recorded_up_to_a_size_and_their_shapes_recur(counted: Counted) -> None:
    model, cache = CapturedModel(counted, 64, counted.record, mixed=512), object()  # type: ignore[arg-type]
    buffers = Buffers("cpu", 1000, 400, 12, small=model.small)
    decodes = [Run([5], 0, [1], 1)] * 250
    for prompt, wanted in ((30, 1), (64, 1), (70, 0), (1, 1), (600, 1), (600, 1)):  # 280, 314 and 320 tokens
        model.forward(buffers.fill([*decodes, Run([5] * prompt, 0, [1] * 12, wanted)]), cache)  # type: ignore[arg-type]
    assert counted.done == ["run", "record", "replay", "replay", "run", "run", "run"]
    assert model.count_recorded() == 1


def test_prompts_whose_scores_would_fill_a_graph_s_memory_are_not_recorded(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saccade.engine.graphs.MIXED_SCORES", 320 * 64 * 64)
    model, cache = CapturedModel(counted, 64, counted.record), object()  # type: ignore[arg-type]
    buffers = Buffers("cpu", 400, 1, 128, small=model.small)
    for pages in (64, 64, 65, 65):  # 65 pages: a table of 128
        run = Run([5] * 300, 64 * pages - 300, [1] * pages, 1)
        model.forward(buffers.fill([run]), cache)  # type: ignore[arg-type]
    assert counted.done == ["run", "record", "replay", "run", "run"]


def test_recordings_of_large_steps_share_the_memory_of_their_results(counted: Counted) -> None:
    found = []

    def keep(run: Any, pool: Any) -> Recording:
        found.append(run())
        return Recording(lambda: None, found[-1])

    model, cache = CapturedModel(counted, 64, keep), object()  # type: ignore[arg-type]
    buffers = Buffers("cpu", 1024, 4, 16, small=model.small)
    for size in (257, 257, 600, 600, 24, 24):
        model.forward(buffers.fill([Run([5] * size, 0, [1] * 16, 1)]), cache)  # type: ignore[arg-type]
    large, larger, small = (tensor.data_ptr() for tensor in found)
    assert [len(tensor) for tensor in found] == [320, 640, 24] and large == larger != small


def test_a_step_whose_memory_is_not_there_twice_runs_as_it_is(counted: Counted) -> None:
    asked = 0

    def refuse(run: Any, pool: Any) -> Recording:
        nonlocal asked
        asked += 1
        raise torch.cuda.OutOfMemoryError("no memory")

    model, cache = CapturedModel(counted, 64, refuse), object()  # type: ignore[arg-type]
    buffers = Buffers("cpu", 64, 4, 4, small=model.small)
    for _ in range(4):
        model.forward(buffers.fill([Run([5], 0, [1], 1)]), cache)  # type: ignore[arg-type]
    assert counted.done == ["run"] * 4 and asked == 1 and model.count_recorded() == 0


def test_long_steps_and_other_caches_are_run_as_they_are(counted: Counted) -> None:
    model, cache = capture(counted), object()
    buffers = Buffers("cpu", 64, 4, 4, small=MOST_CAPTURED)
    for runs, where in ((17, cache), (17, cache), (1, cache), (1, object())):
        model.forward(buffers.fill([Run([5] * runs, 0, [1], 1)]), where)  # type: ignore[arg-type]
    assert counted.done == ["run"] * 4


def test_steps_that_give_selections_have_recordings_of_their_own(counted: Counted) -> None:
    """Replayed as other steps are; what each of them selected comes to the job, among requests that want nothing."""
    config = tiny_config()
    counted.model = plain = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    found = []
    for model, small in ((plain, 0), (capture(counted), MOST_CAPTURED)):
        cache = allocate_cache(config, 20, "float32", "cpu", mtp=False)
        engine = Engine(
            model,  # type: ignore[arg-type]
            cache,
            Scheduler(20, 96, 4, config.max_position_embeddings),
            config.vocab_size,
            small=small,
        )
        greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        jobs = [engine.add(list(range(2, 2 + n)), greedy, capture=n != 40) for n in (5, 40, 61)]
        while engine.jobs:
            engine.step()
        found.append([torch.stack(job.selections()) for job in jobs if job.seen is not None])
    assert counted.done.count("replay") >= 15 and len(found[0]) == 2
    assert all(mine.equal(theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("is_refused", [False, True])
def test_prompts_that_give_selections_are_recorded_where_there_is_a_place(
    counted: Counted, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """Large steps, the second of which is recorded and the third replayed: each selects what the model does."""
    monkeypatch.setattr("saccade.engine.graphs.MOST_CAPTURED", 32)
    monkeypatch.setattr("saccade.engine.steps.selections.LARGE_STEP", 32)
    if is_refused:
        monkeypatch.setattr("saccade.engine.steps.selections.LEAST_PLACE", 1 << 30)
    config = tiny_config()
    counted.model = plain = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    found, captured = [], CapturedModel(counted, 64, counted.record)  # type: ignore[arg-type]
    for model, small in ((plain, 0), (captured, captured.small)):
        cache = allocate_cache(config, 20, "float32", "cpu", mtp=False)
        engine = Engine(model, cache, Scheduler(20, 96, 2, 256), config.vocab_size, small=small)  # type: ignore[arg-type]
        for first in (1, 2, 3):
            job = engine.add([first, *range(2, 96), 3], SamplingParams(max_tokens=1, temperature=0.0), capture=True)
            while engine.jobs:
                engine.step()
            found.append(torch.stack(job.selections()))
    assert counted.done == (["run"] * 3 if is_refused else ["run", "record", "replay", "replay"])
    assert found[0].shape == (config.num_hidden_layers, 96, config.index_topk)
    assert all(mine.equal(theirs) for mine, theirs in zip(found[3:], found[:3], strict=True))
    assert not found[0].equal(found[2])


def test_the_graph_that_was_not_run_for_longest_is_dropped(counted: Counted) -> None:
    model, cache = capture(counted, most=2), object()
    batches = [step_batch([(0, [1] * size, 0)], torch.tensor([[1]])) for size in (1, 2, 3)]
    for i in (0, 0, 1, 1, 0, 2, 0, 1):
        model.forward(batches[i], cache)  # type: ignore[arg-type]
    steps = [done for done in counted.done if done != "record"]
    assert steps == ["run", "replay", "run", "replay", "replay", "run", "replay", "run"]


def test_an_engine_on_replayed_steps_gives_the_same_tokens(counted: Counted) -> None:
    config = tiny_config()
    plain = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    counted.model = plain
    answers = []
    for model, small in ((plain, 0), (capture(counted), MOST_CAPTURED)):
        cache = allocate_cache(config, 20, "float32", "cpu", mtp=False)
        scheduler = Scheduler(20, 96, 4, config.max_position_embeddings)
        engine = Engine(model, cache, scheduler, config.vocab_size, small=small)  # type: ignore[arg-type]
        greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        jobs = [engine.add(list(range(2, 2 + n)), greedy) for n in (5, 40, 61)]
        while engine.jobs:
            engine.step()
        answers.append([job.request.generated for job in jobs])
    assert answers[0] == answers[1] and counted.done.count("replay") >= 15


# What differs in the choice of tokens alone; a step of these has the same batch, whoever is in it.
GREEDY = {"temperature": 0.0}
RANDOM = {"temperature": 1.0, "seed": 3}
USUAL = [
    GREEDY, RANDOM, RANDOM | {"top_k": 3}, RANDOM | {"top_p": 0.6}, RANDOM | {"min_p": 0.1},
    GREEDY | {"logprobs": 2}, RANDOM | {"logprobs": 0}, RANDOM | {"logprobs": 2, "prompt_logprobs": 1},
]  # fmt: skip
CHANGED = [GREEDY | {"presence_penalty": 1.0}, RANDOM | {"logit_bias": {7: 3}}]


def answer(model: Any, small: int, groups: list[list[dict[str, Any]]]) -> list[Any]:
    """What an engine answers to the groups, one after the other: tokens and log-probabilities."""
    config = tiny_config()
    cache = allocate_cache(config, 20, "float32", "cpu", mtp=False)
    scheduler = Scheduler(20, 96, 4, config.max_position_embeddings)
    engine, answers = Engine(model, cache, scheduler, config.vocab_size, small=small), []
    for group in groups:
        params = [SamplingParams(max_tokens=20, ignore_eos=True, **p) for p in group]
        jobs = [engine.add(list(range(2, 9 + i)), p) for i, p in enumerate(params)]
        while engine.jobs:
            engine.step()
        answers += [(job.request.generated, job.logprobs, job.prompt_logprobs) for job in jobs]
    return answers


def test_every_usual_choice_of_tokens_is_in_a_recording_of_its_kind(counted: Counted) -> None:
    """One request after the other and side by side, in batches of the same sizes: a recording of another kind, or one
    that read the numbers of an earlier step, would give other tokens."""
    config = tiny_config()
    counted.model = plain = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    groups = [[each] for each in USUAL] + [USUAL[i : i + 3] for i in range(6)] + [[GREEDY]]
    captured, outside = capture(counted), list[int]()
    captured.logits = lambda rows: (outside.append(1), plain.logits(rows))[1]  # type: ignore[method-assign]
    expected = answer(plain, 0, groups)
    assert len({str(one) for one in expected[: len(USUAL)]}) == len(USUAL)
    assert answer(captured, MOST_CAPTURED, groups) == expected
    assert counted.done.count("replay") > 150 and not outside


def test_what_changes_logits_is_chosen_behind_a_recording(counted: Counted) -> None:
    """The host finds masks while the device computes the model, which is replayed all the same."""
    config = tiny_config()
    counted.model = plain = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    captured, outside = capture(counted), list[int]()
    captured.logits = lambda rows: (outside.append(1), plain.logits(rows))[1]  # type: ignore[method-assign]
    groups = [[GREEDY], CHANGED, [GREEDY, *CHANGED]]
    assert answer(captured, MOST_CAPTURED, groups) == answer(plain, 0, groups)
    assert 40 <= len(outside) <= 44 and counted.done.count("replay") > 40


def test_a_recording_is_of_its_columns_and_of_its_kind(counted: Counted) -> None:
    """It reads its wants where they were, and looks at a target only if its kind has one."""
    config = tiny_config()
    counted.model = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    captured, cache = capture(counted), allocate_cache(config, 20, "float32", "cpu", mtp=False)
    batch = step_batch([(0, [1], 0)], torch.tensor([[1]]))
    first, second = (Spec.build([Row(target=token)], 1, -1, "cpu") for token in (5, 7))
    likeliest = first._replace(kind=ChoiceKind())
    chosen = [int(captured.choose(batch, cache, spec).tokens) for spec in (first, first, second, likeliest)]
    assert chosen[:3] == [5, 5, 7] and chosen[3] not in (5, 7)


def test_numbers_that_are_not_finite_end_a_request_whose_choice_is_recorded(counted: Counted) -> None:
    config = tiny_config()
    counted.model = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    captured, cache = capture(counted), allocate_cache(config, 20, "float32", "cpu", mtp=False)
    scheduler = Scheduler(20, 96, 4, config.max_position_embeddings)
    engine = Engine(captured, cache, scheduler, config.vocab_size, small=MOST_CAPTURED)
    job = engine.add([2, 3, 4], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    for _ in range(6):
        engine.step()
    counted.model.norm.weight.fill_(float("nan"))
    while engine.jobs:
        engine.step()
    assert job.request.finish_reason == "error" and len(job.request.generated) == 6


# Steps with drafts.

CONFIG = tiny_config(num_hidden_layers=1, first_k_dense_replace=0)
DRAFTING = Transformer(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG)), Reference())


class CountedDrafts:
    """Steps with drafts; recordings run again into the same tensors. `kinds` says what was replayed, and how large."""

    def __init__(self, mixed: int = 0) -> None:
        self.done: list[str] = []
        self.kinds: list[tuple[int, StepKind]] = []
        self.drafter = Drafter(DRAFTING, DRAFTING.mtp, False, 512)  # type: ignore[arg-type]
        self.run = CapturedDrafts(self.drafter, record=self.record, mixed=mixed)
        steps = self.run._steps._recordings
        self._inner, steps.run = steps.run, self.note  # type: ignore[method-assign]

    def note(self, held: Any, how: Any, step: Any) -> Any:
        self.latest = len(held[0].tokens), how
        return self._inner(held, how, step)

    def record(self, run: Any, pool: Any) -> Recording[Packed]:
        result = make_empty(run())

        def replay() -> None:
            fill(result, run())
            self.done.append("replay")

        self.done.append("record")
        self.kinds.append(self.latest)
        return Recording(replay, result)


def test_an_engine_on_replayed_drafts_gives_the_same_tokens(counted: Counted) -> None:
    drafts = CountedDrafts()
    wants = [
        (list(range(2, 2 + n)), SamplingParams(max_tokens=m, temperature=t, seed=n, ignore_eos=True, logprobs=lp))
        for n, m, t, lp in ((5, 60, 0.0, None), (20, 30, 1.0, None), (31, 20, 0.0, None), (9, 6, 1.0, 2))
    ]
    answers = []
    for speculate, run in ((0, None), (3, EagerDrafts(drafts.drafter)), (3, drafts.run)):
        cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
        scheduler = Scheduler(20, 96, 4, CONFIG.max_position_embeddings)
        options = {"small": MOST_CAPTURED, "run_drafts": run, "speculate": speculate}
        engine = Engine(DRAFTING, cache, scheduler, CONFIG.vocab_size, **options)  # type: ignore[arg-type]
        jobs = [engine.add(*want) for want in wants]
        while engine.jobs:
            engine.step()
        answers.append([job.request.generated for job in jobs])
    assert answers[0] == answers[1] == answers[2] and drafts.done.count("replay") > 25
    # There is one recording of each sort of step, sampling ones apart.
    assert len(set(drafts.kinds)) == len(drafts.kinds) and max(size for size, _ in drafts.kinds) <= 16
    assert {kind.choice.is_random for _, kind in drafts.kinds} == {True, False}
    assert all(kind.drafts == 3 for _, kind in drafts.kinds) and {k.choice.logprobs for _, k in drafts.kinds} == {-1, 5}


def test_steps_with_prompts_are_recorded_and_replayed_with_drafts(counted: Counted) -> None:
    """Chunks of 96 tokens, which make no drafts, and the ends of prompts, which do."""
    drafts, answers = CountedDrafts(mixed=4096), []
    for run in (EagerDrafts(drafts.drafter), drafts.run):
        cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
        options = {"small": 4096, "run_drafts": run, "speculate": 2}
        engine = Engine(DRAFTING, cache, Scheduler(20, 96, 4, 512), CONFIG.vocab_size, **options)  # type: ignore[arg-type]
        jobs = []
        for first in (2, 3, 4, 5):
            jobs.append(
                engine.add([first, *range(2, 90), *range(2, 50)], SamplingParams(max_tokens=8, temperature=0.0))
            )
            while engine.jobs:
                engine.step()
        answers.append([job.request.generated for job in jobs])
    assert answers[0] == answers[1] and len({tuple(tokens) for tokens in answers[0]}) > 1
    assert {(96, 0), (48, 2)} <= {(size, kind.drafts) for size, kind in drafts.kinds}


def test_a_greedy_step_s_recording_is_not_replayed_for_a_sampled_step(counted: Counted) -> None:
    """One request after the other, in batches of the same sizes: only the kind tells their steps apart."""
    drafts, answers = CountedDrafts(), []
    for run in (EagerDrafts(drafts.drafter), drafts.run):
        cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
        options = {"small": MOST_CAPTURED, "run_drafts": run, "speculate": 2}
        engine = Engine(DRAFTING, cache, Scheduler(20, 96, 4, 512), CONFIG.vocab_size, **options)  # type: ignore[arg-type]
        jobs = []
        for temperature in (0.0, 1.0, 0.0):
            params = SamplingParams(max_tokens=12, temperature=temperature, seed=5, ignore_eos=True)
            jobs.append(engine.add(list(range(2, 12)), params))
            while engine.jobs:
                engine.step()
        answers.append([job.request.generated for job in jobs])
    assert answers[0] == answers[1] and answers[0][0] == answers[0][2] != answers[0][1]
    assert {kind.choice.is_random for _, kind in drafts.kinds} == {False, True} and drafts.done.count("replay") > 6


def test_changes_of_logits_are_inputs_of_recordings(counted: Counted) -> None:
    """Penalties, biases and bans in replayed steps: the text is that of steps as they are, and no recording of another
    kind is taken for one of theirs."""
    drafts, answers = CountedDrafts(), []
    for run in (EagerDrafts(drafts.drafter), drafts.run):
        cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
        options = {"small": MOST_CAPTURED, "run_drafts": run, "speculate": 2}
        engine = Engine(DRAFTING, cache, Scheduler(20, 96, 4, 512), CONFIG.vocab_size, **options)  # type: ignore[arg-type]
        jobs = []
        for i, changed in enumerate(
            ({}, {"frequency_penalty": 2.0}, {"logit_bias": {7: 4}}, {"repetition_penalty": 2})
        ):
            params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, **changed)  # type: ignore[arg-type]
            jobs += [engine.add(list(range(2, 12)), params) for _ in range(1 + i % 2)]
            while engine.jobs:
                engine.step()
        answers.append([job.request.generated for job in jobs])
    assert answers[0] == answers[1] and len({tuple(tokens) for tokens in answers[0]}) == 4
    kinds = {kind.changes for _, kind in drafts.kinds}
    assert len(kinds) >= 3 and None in kinds and drafts.done.count("replay") > 10


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_drafts_run_on_the_kernels_that_were_asked_for_and_say_so(kernels: str) -> None:
    built = build_model(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG)), kernels, drafts=True)
    assert built.run_drafts is not None and name_kernels(built.run_drafts) == kernels


def test_drafts_on_slower_kernels_are_named() -> None:
    fast = DRAFTING.with_ops(Gpu())
    halves = Drafter(fast, DRAFTING.mtp, False, 512), Drafter(DRAFTING, fast.mtp, False, 512)  # type: ignore[arg-type]
    assert {name_kernels(CapturedDrafts(half)) for half in halves} == {"fast and reference"}
    assert name_kernels(EagerDrafts(make_drafter(fast))) == "fast without CUDA graphs"


def test_prompts_and_scores_are_run_as_they_are(counted: Counted) -> None:
    drafts = CountedDrafts()
    cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
    engine = Engine(
        DRAFTING, cache, Scheduler(20, 96, 4, 512), 96, small=MOST_CAPTURED, run_drafts=drafts.run, speculate=2
    )
    for _ in range(2):  # the same prompt twice: its step has a shape that came before
        engine.add(list(range(2, 30)), SamplingParams(max_tokens=1))
        engine.add_scoring(list(range(2, 22)))
        while engine.jobs:
            engine.step()
    assert drafts.done == []


def test_drafted_steps_that_give_selections_are_replayed_too(counted: Counted) -> None:
    def record(run: Any, pool: Any) -> Recording[Any]:
        def replay() -> None:
            recording.result = run()
            drafts.done.append("replay")

        recording: Recording[Any] = Recording(replay, None)
        return recording

    drafts, found = CountedDrafts(), []
    for runner in (EagerDrafts(drafts.drafter), CapturedDrafts(drafts.drafter, record=record)):
        cache = allocate_cache(CONFIG, 20, "float32", "cpu", mtp=True)
        options = {"small": MOST_CAPTURED, "run_drafts": runner, "speculate": 2}
        engine = Engine(DRAFTING, cache, Scheduler(20, 96, 4, 512), CONFIG.vocab_size, **options)  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        job = engine.add(list(range(2, 22)), params, capture=True)
        while engine.jobs:
            engine.step()
        found.append(job.selections()[0])
    assert drafts.done.count("replay") > 5 and found[0].equal(found[1]) and found[0].shape == (49, CONFIG.index_topk)
