"""The load plan: declared by destination, executed by source, proven before a byte is read.

The family's parameters.py says what the model needs, lower.py turns that and the file headers into steps, check.py
proves them, show.py prints them. Standard library only. The executor is weights/loader.py.
"""

from collections.abc import Iterable

from saccade.checkpoint.index import Index, paused_collector
from saccade.config.file import Config
from saccade.errors import PlanError, Problem
from saccade.models.parameters import Layout
from saccade.plan.check import check, check_sources
from saccade.plan.lower import Sources, find_extras, find_leftovers, find_shapes, lower
from saccade.plan.names import find_root, list_parameters
from saccade.plan.strays import leave_strays
from saccade.plan.types import Plan

__all__ = [
    "Layout", "Plan", "check", "check_sources", "find_leftovers", "find_shapes", "make_plan", "plan_all", "plan_ranks",
    "prove", "prove_ranks", "require",
]  # fmt: skip


def make_plan(config: Config, index: Index, layout: Layout = Layout(), dtype: str = "auto", mtp: bool = True) -> Plan:
    """What rank `layout.rank` does to load the checkpoint. Problems are in the plan, see `check`; an impossible layout
    raises PlanError."""
    return plan_ranks(config, index, [layout], dtype, mtp)[0]


def plan_ranks(
    config: Config, index: Index, layouts: Iterable[Layout], dtype: str = "auto", mtp: bool = True
) -> list[Plan]:
    """The plans of several ranks; each tensor of the checkpoint is looked up and judged once for all of them."""
    if dtype not in ("auto", "float32"):
        raise PlanError(f'dtype={dtype!r}: "auto" (as stored, else BF16) and "float32" exist')
    with paused_collector():
        index = leave_strays(config, index)
        extras, notes = find_extras(config, index, mtp)
        notes = config.notes + index.notes + notes
        sources = Sources(index)
        root = find_root(config, index.entries)
        return [
            lower(list_parameters(config, root, at, extras), config, sources, at, dtype, mtp, notes) for at in layouts
        ]


def plan_all(plan: Plan) -> list[Plan]:
    """The plans of all ranks of a plan's layout, by rank; its own is itself."""
    tp, ep, rank = plan.layout
    plans = plan_ranks(
        plan.config, plan.index, [Layout(tp, ep, r) for r in range(tp) if r != rank], plan.dtype, plan.mtp
    )
    return [*plans[:rank], plan, *plans[rank:]]


def prove(plan: Plan) -> list[Problem]:
    """Every problem of every rank of the plan's layout, each once; [] means that all ranks together load completely."""
    return prove_ranks(plan_all(plan))


def prove_ranks(plans: list[Plan]) -> list[Problem]:
    """As `prove`, of the plans of all ranks."""
    with paused_collector():
        found = {problem: None for p in plans for problem in check(p)}
        found.update((problem, None) for problem in check_sources(plans))
    return list(found)


def require(plan: Plan) -> None:
    """Raise PlanError with every problem unless the plan is proven complete. There is no flag to go on."""
    from saccade.plan.problems import show_causes

    problems = prove(plan)
    if problems:
        message = f"{plan.index.title}: cannot be loaded completely\n{show_causes(problems, plan.index)}"
        raise PlanError(message, tuple(problems))
