"""Run the tasks and the probe, and print what they found.

    python -m tools.train_tiny.report MODEL [PROBLEMS] [TOKENS]

Two tables: how many held-out problems a model answers exactly, as it is used (`dtype="auto"`); and what each
arrangement of the indexer's projection changes, with all else fp32. Next: held_out.py draws problems,
saccade/eval/probe.py compares.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saccade.checkpoint.open import open_model
from saccade.eval.arrangements import ARRANGEMENTS
from saccade.eval.indexers import BOUND, Upcast, read_projections
from saccade.eval.probe import Difference, Spy, probe
from saccade.llm import LLM
from saccade.model.transformer import Transformer
from saccade.params import SamplingParams
from saccade.plan import make_plan
from saccade.weights import load
from tools.train_tiny.held_out import TASKS, Problem, draw_problem


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
        """Standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / self.problems)


@dataclass(frozen=True)
class Report:
    model: str
    dtype: str
    device: str
    matches: list[Match]
    probed: int  # problems that the arrangements were compared on
    arrangements: list[Difference]
    upcasts: list[Upcast]

    def to_json(self) -> dict[str, Any]:
        matches = [asdict(m) | {"share": m.share, "standard_error": m.error} for m in self.matches]
        upcasts = [u._asdict() for u in self.upcasts]
        return {**asdict(self), "matches": matches, "upcasts": upcasts}


def evaluate(path: str | Path | None, problems: int, length: int, device: str = "auto", dtype: str = "auto") -> Report:
    """Answer `problems` held-out problems of each task, those with a long text at `length` tokens, and compare the
    arrangements on as many as a minute or two allows: a third of them."""
    llm = LLM(path, device, dtype, mtp=False)
    asked = {task: [draw_problem(task, i, length) for i in range(problems)] for task in TASKS}
    matches = [match(llm, task, length, some) for task, some in asked.items()]
    device, root = llm.settings.device, llm.settings.path
    del llm
    few = max(1, problems // 3)
    differences, upcasts = compare(root, [p for some in asked.values() for p in some[:few]], device)
    return Report(root, dtype, device, matches, few * len(TASKS), differences, upcasts)


def match(llm: LLM, task: str, length: int, problems: Sequence[Problem]) -> Match:
    answers = llm.generate([p.prompt for p in problems], SamplingParams(temperature=0.0, max_tokens=160))
    exact = sum(is_right(a.text or "", p) for a, p in zip(answers, problems, strict=True))
    return Match(task, 0 if task == "words" else length, len(problems), exact)


def is_right(text: str, problem: Problem) -> bool:
    """Whether the text ends in the problem's result: `#### 42`."""
    return text.rpartition("####")[2].strip() == problem.result and "####" in text


def compare(root: str, problems: Sequence[Problem], device: str) -> tuple[list[Difference], list[Upcast]]:
    """Each arrangement against fp32, on the problems with the answers that the fp32 model gives."""
    yardstick = LLM(root, device, "float32", mtp=False)
    answers = yardstick.generate([p.prompt for p in problems], SamplingParams(temperature=0.0, max_tokens=160))
    right = [is_right(a.text or "", p) for a, p in zip(answers, problems, strict=True)]
    prompts = [yardstick.encode(p.prompt) for p in problems]
    sequences = [(tokens + a.token_ids, len(tokens)) for tokens, a in zip(prompts, answers, strict=True)]
    del yardstick
    config, index = open_model(root)
    weights = load(make_plan(config, index, dtype="float32", mtp=False), device)
    spy = Spy()
    model = Transformer(config, weights, spy)  # type: ignore[arg-type]
    projections, upcasts = read_projections(config, index, device)
    return probe(model, spy, projections, ARRANGEMENTS, sequences, right, device), upcasts


def show_report(report: Report) -> str:
    lines = [f"{report.model}, dtype {report.dtype}, {report.device}", "", "task       tokens  problems  exact match"]
    for m in report.matches:
        lines.append(f"{m.task:10} {m.length or '':>6} {m.problems:>9}  {m.share:6.1%} +- {m.error:.1%}")
    lines += ["", f"The indexer's projection, all else fp32, {report.probed} problems", ""]
    lines.append(f"{'arrangement':36} {'exact':>6} {'largest':>9} {'mean':>9}  {'recall':>8} {'missed mass':>12}")
    for d in report.arrangements:
        worst, mass = min(d.recall), max(d.missed_mass)
        share = d.exact / report.probed
        lines.append(
            f"{d.name:36} {share:6.1%} {d.log_prob_largest:9.1e} {d.log_prob_mean:9.1e}  {worst:8.3%} {mass:12.4%}"
        )
    lines.append("largest, mean: difference of log-probabilities; recall, missed mass: of the worst layer")
    layers = [f"  {d.name:34} " + " ".join(f"{m:8.4%}" for m in d.missed_mass) for d in report.arrangements[1:]]
    lines += ["", "missed attention mass by layer", *layers, "", "upcast of wk to BF16"]
    for u in report.upcasts:
        span = f"scales {u.least_scale:.2e} to {u.largest_scale:.2e}, {u.column_blocks} column blocks"
        how = "exact" if u.rounding == 0 else f"rounds by at most {u.rounding:.1e} (bound {BOUND:.1e})"
        lines.append(f"  {u.tensor}: {u.stored}, {span}; {how}")
    return "\n".join(lines)


if __name__ == "__main__":
    model, *numbers = sys.argv[1:]
    problems, tokens = [*map(int, numbers), *(6, 512)[len(numbers) :]]
    print(show_report(evaluate(model, problems, tokens)))
