"""`saccade eval`: held-out problems, drafts, and what each arrangement of the indexer's projection changes.

The problems are answered by the model as it is used, greedy. Everything about arrangements is fp32 but for the one
projection, on the text of the same problems. Next: tasks.py draws problems, probe.py compares, show.py prints.
"""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from saccade.api.llm import LLM
from saccade.api.loading.machine import make_drafter
from saccade.api.loading.prepare import prepare
from saccade.api.outputs import Completion
from saccade.checkpoint.open import open_model
from saccade.engine.params import SamplingParams
from saccade.errors import ConfigError, RequestError
from saccade.eval.arrangements import ARRANGEMENTS, CACHED_FP8, CACHED_LATENTS, Arrangement
from saccade.eval.drafts import Drafts, count_drafts, find_accepted, find_told
from saccade.eval.indexers import read_projections
from saccade.eval.probe import ProbeDifference, probe
from saccade.eval.tasks import TASKS, TaskQuestion, draw_test
from saccade.inspect.findings import Upcast
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import DSA, find_family
from saccade.ops.reference import Reference
from saccade.plan import make_plan
from saccade.text.tokenizer import require_tokenizer
from saccade.weights.loader import load

Item = TypeVar("Item")
# What is shown while something takes long: a verb, what is done and in all, and of what.
Watch = Callable[[str, Callable[[], tuple[int, int]], str], AbstractContextManager[None]]

LONGEST_ANSWER = {"words": 60, "recall": 40, "story": 100}  # tokens; the right ones have at most 37, 19 and 77
SHORTEST = 128  # tokens of a long text: below that no fact is far away


class Counted(list[Item]):
    """A list that knows how many of its items were taken, for whoever watches."""

    taken = 0

    def __iter__(self) -> Iterator[Item]:
        for self.taken, item in enumerate(super().__iter__()):
            yield item
        self.taken = len(self)


def watch_nothing(verb: str, poll: Callable[[], tuple[int, int]], noun: str) -> AbstractContextManager[None]:
    return nullcontext()


class Answered(NamedTuple):
    """A problem with the model's own answer."""

    problem: TaskQuestion
    prompt: list[int]
    answer: list[int]
    is_right: bool


@dataclass(frozen=True)
class Match:
    """Problems of one task, and how many were answered exactly."""

    task: str
    length: int  # tokens of a long text; 0 where the task has none
    problems: int
    exact: int

    @property
    def share(self) -> float:
        return self.exact / self.problems

    @property
    def error(self) -> float:
        """Standard error of the share, as if one more had been right and one more wrong: 24 of 24 is no certainty."""
        n, share = self.problems + 2, (self.exact + 1) / (self.problems + 2)
        return math.sqrt(share * (1 - share) / n)


@dataclass(frozen=True)
class EvalReport:
    command: str  # that repeats it
    model: str
    dtype: str
    index_cache: str
    latent_cache: str
    activations: str
    kernels: str
    device: str
    machine: str  # what it ran on, and torch's version
    matches: list[Match]
    drafts: list[Drafts]  # empty without an MTP layer
    probed: int  # problems that the arrangements were compared on
    arrangements: list[ProbeDifference]
    upcasts: list[Upcast]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "matches": [asdict(m) | {"share": m.share, "standard_error": m.error} for m in self.matches],
            "drafts": [d._asdict() | {"share": d.share} for d in self.drafts],
            "upcasts": [u._asdict() for u in self.upcasts],
        }


def evaluate(
    path: str | Path | None = None,
    problems: int = 24,
    length: int = 1024,
    probed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    asked: Sequence[str] = TASKS,
    tell: Callable[[str], None] = lambda _: None,
    index_cache: str = "bf16",
    kernels: str = "auto",
    revision: str | None = None,
    watch: Watch = watch_nothing,
    threads: int | None = None,
    tp: int = 1,
    ep: int = 1,
    activations: str = "auto",
    latent_cache: str = "bf16",
) -> EvalReport:
    """Answer `problems` held-out problems of each task, those with a long text at about `length` tokens, and compare
    the arrangements on the first `probed` of each, 2 if there are as many. `asked` names the tasks; `tell` hears what
    is being done, `watch` surrounds what takes long. With `index_cache="fp8"` or `latent_cache="fp8"` the problems are
    answered so, and the arrangement that really caches FP8 is compared too.

    Raises RequestError if the numbers cannot be served, and what `LLM` raises.
    """
    if problems < 1:
        raise RequestError(f"problems: expected at least 1, found {problems}")
    if tp > 1 and probed:
        raise RequestError(f"probed: arrangements run on one rank; expected 0 with tp={tp}, found {probed}")
    if probed is not None and not 0 <= probed <= problems:
        raise RequestError(f"probed: expected 0 to {problems}, the number of problems, found {probed}")
    asked = list(dict.fromkeys(asked))
    if not asked or not set(asked) <= set(TASKS):
        raise RequestError(f"task: expected {', '.join(TASKS)}, found {', '.join(asked) or 'none'}")
    if length < SHORTEST and asked != ["words"]:
        raise RequestError(f"tokens: expected at least {SHORTEST} for a long text, found {length}")
    prepared = prepare(
        path, device, dtype, index_cache=index_cache, kernels=kernels, revision=revision, threads=threads, tp=tp,
        ep=ep, activations=activations, latent_cache=latent_cache, tell=tell,
    )  # fmt: skip
    family = find_family(prepared.config.model_type)
    is_compared = tp == 1 and family is DSA
    if probed and not is_compared:
        raise RequestError(
            f"probed: the arrangements are those of {DSA.name}'s indexer; expected 0 for {family.name}, found {probed}"
        )
    probed = min(2, problems) * is_compared if probed is None else probed
    require_tokenizer(prepared.side.tokenizer, "asking problems", prepared.side.obstacle)
    for note in prepared.settings.notes:
        tell(f"note: {note}")
    longest = min(prepared.settings.max_length, prepared.settings.cache_tokens)
    if length > longest and asked != ["words"]:
        raise RequestError(f"tokens: expected at most {longest}, what the model's cache holds, found {length}")
    llm = LLM.of(prepared)
    answered: dict[str, list[Answered]] = {}
    for task in asked:
        tell(f"{task}: {problems} problems")
        asked_now = [draw_test(task, i, length) for i in range(problems)]
        with watch(task, partial(count_ended, llm, problems), "problems"):
            answered[task] = answer(llm, asked_now)
    matches = [
        Match(task, 0 if task == "words" else length, problems, sum(a.is_right for a in some))
        for task, some in answered.items()
    ]
    drafts: list[Drafts] = []
    if llm.model.mtp is not None and tp == 1:  # the layer runs outside of the engine
        tell("drafts")
        drafts = measure_drafts(llm, answered, watch=watch)
    root, device, used = llm.settings.path, llm.settings.device, llm.settings.kernels
    llm.close()
    del llm
    few = [a for some in answered.values() for a in some[:probed]]
    differences, upcasts = list[ProbeDifference](), list[Upcast]()
    if is_compared:
        tell("arrangements")
        differences, upcasts = compare_arrangements(
            root, few, device, choose_arrangements(index_cache, latent_cache), watch
        )
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    machine = f"{name}, torch {torch.__version__}"
    options = f"--problems {problems} --tokens {length} --probed {probed} --device {device} --dtype {dtype}"
    options += f" --index-cache {index_cache}" if index_cache != "bf16" else ""
    options += f" --latent-cache {latent_cache}" if latent_cache != "bf16" else ""
    options += f" --activations {activations}" if activations != "auto" else ""
    options += f" --kernels {kernels}" if kernels != "auto" else ""
    options += f" --threads {threads}" if threads is not None else ""
    options += f" --tp {tp} --ep {ep}" if tp > 1 else ""
    command = " ".join(["saccade eval", *([str(path)] if path else []), options, *(f"--task {task}" for task in asked)])
    model = str(path) if path else "bundled"
    how = (dtype, index_cache, latent_cache, prepared.settings.activations, used, device, machine)
    return EvalReport(command, model, *how, matches, drafts, len(few), differences, upcasts)


def choose_arrangements(index_cache: str, latent_cache: str) -> list[Arrangement]:
    """Those that are always compared, and those that cache as the problems were answered."""
    cached = ((CACHED_FP8, index_cache), (CACHED_LATENTS, latent_cache))
    return [*ARRANGEMENTS, *(arrangement for arrangement, how in cached if how == "fp8")]


def answer(llm: LLM, problems: Sequence[TaskQuestion]) -> list[Answered]:
    """The model's greedy answers."""
    prompts = [llm.encode(p.prompt) for p in problems]
    room = min(llm.settings.max_length, llm.settings.cache_tokens)
    longest = max(map(len, prompts))
    if longest >= room:
        raise RequestError(
            f"a problem of task {problems[0].task} has {longest} of this model's tokens, the cache holds {room}:"
            " ask for a shorter text, or raise the cache"
        )
    options = [
        SamplingParams(temperature=0.0, max_tokens=min(LONGEST_ANSWER[p.task], room - len(prompt)))
        for p, prompt in zip(problems, prompts, strict=True)
    ]
    answers = llm.generate(prompts, options)
    return [
        Answered(problem, prompt, made.token_ids, is_right(made, problem))
        for problem, prompt, made in zip(problems, prompts, answers, strict=True)
    ]


def is_right(made: Completion, problem: TaskQuestion) -> bool:
    """Whether the text ends in the problem's result: `#### 42`."""
    _, mark, result = (made.text or "").rpartition("####")
    return bool(mark) and result.strip() == problem.result


def measure_drafts(
    llm: LLM, answered: dict[str, list[Answered]], most: int = 24, watch: Watch = watch_nothing
) -> list[Drafts]:
    """Drafts of all tokens of each task's answers, and, of `recall`, of those that must be found far away."""
    assert llm.model.mtp is not None
    drafter, s = make_drafter(llm.model), llm.settings
    found = []
    for task, some in answered.items():
        everywhere, far = Drafts(task, 0, 0), Drafts(f"{task}, found values", 0, 0)
        few = Counted(some[:most])
        with watch(f"drafts of {task}", partial(count_taken, few), "problems"):
            for a in few:
                tokens = a.prompt + a.answer
                start, cached = len(a.prompt), (s.index_cache, s.latent_cache)
                accepted = find_accepted(drafter, llm.config, tokens, s.dtype, s.device, *cached, start)
                everywhere = add(everywhere, count_drafts(accepted, range(start + 1, len(tokens)), task))
                told = find_told([llm.decode([token]) for token in a.answer])
                far = add(far, count_drafts(accepted, [start + i for i in told if i > 0], far.places))
        found += [everywhere, far] if task == "recall" else [everywhere]
    return found


def count_ended(llm: LLM, requests: int) -> tuple[int, int]:
    return requests - len(llm.engine.jobs), requests


def count_taken(items: Counted[Any]) -> tuple[int, int]:
    return items.taken, len(items)


def add(one: Drafts, other: Drafts) -> Drafts:
    return Drafts(one.places, one.tokens + other.tokens, one.accepted + other.accepted)


def compare_arrangements(
    root: str,
    answered: Sequence[Answered],
    device: str,
    arrangements: Sequence[Arrangement] = ARRANGEMENTS,
    watch: Watch = watch_nothing,
) -> tuple[list[ProbeDifference], list[Upcast]]:
    """Each arrangement against fp32, on problems with the answers that were given; without any, the upcasts alone."""
    config, index = open_model(root)
    if find_family(config.model_type) is not DSA or not isinstance(config, ModelConfig):
        raise ConfigError(f"{root}: model_type {config.model_type}: its indexer's projection has no arrangements here")
    projections, upcasts = read_projections(config, index, device)
    if not answered:
        return [], upcasts
    weights = load(make_plan(config, index, dtype="float32", mtp=False), device)
    model = Transformer(config, weights, Reference())
    sequences = Counted((a.prompt + a.answer, len(a.prompt)) for a in answered)
    right = [a.is_right for a in answered]
    with watch("comparing", partial(count_taken, sequences), "problems"):
        return probe(model, projections, arrangements, sequences, right, device), upcasts
