"""Answers of models that call tools, as canitoolcall has them, and how we read one."""

from collections.abc import Sequence

from canitoolcall.fixtures import Fixture, load_families, load_fixtures
from canitoolcall.results import ParseResult, StreamAccumulator

from saccade.chat.calls import DsmlCalls, FencedCalls, TaggedCalls
from saccade.chat.parser import AnswerParser
from saccade.chat.syntax import DEEPSEEK_V32, Syntax
from saccade.chat.types import CallDelta, ContentDelta, ReasoningDelta

FAMILIES = load_families()
SYNTAXES = {
    "deepseek-ai/DeepSeek-V3-0324": Syntax(has_reasoning=True, calls=FencedCalls(is_fenced=True)),
    "deepseek-ai/DeepSeek-V3.1": Syntax(has_reasoning=True, calls=FencedCalls()),
    "deepseek-ai/DeepSeek-V3.2": DEEPSEEK_V32,
    "deepseek-ai/DeepSeek-V4-Flash": Syntax(has_reasoning=True, calls=DsmlCalls("tool_calls")),
    "zai-org/GLM-4.5": Syntax(has_reasoning=True, calls=TaggedCalls(), drops_breaks=True),
    "zai-org/GLM-4.7": Syntax(has_reasoning=True, calls=TaggedCalls(), drops_breaks=True),
    "zai-org/GLM-5.3": Syntax(has_reasoning=True, calls=TaggedCalls(), drops_breaks=True),
}
CASES = [case for case in load_fixtures(families=["deepseek", "glm"]) if case.reference_model in SYNTAXES]


def find_prompt(case: Fixture) -> str:
    """What the answer follows."""
    reference = FAMILIES[case.family].reference_for(case.reference_model)
    assert reference is not None
    return case.generation_prompt or reference.default_generation_prompt or ""


def parse(case: Fixture, pieces: Sequence[str]) -> ParseResult:
    parser = AnswerParser(SYNTAXES[case.reference_model], find_prompt(case), case.tools)
    found = StreamAccumulator()
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        if isinstance(delta, ContentDelta):
            found.add_content(delta.text)
        elif isinstance(delta, ReasoningDelta):
            found.add_reasoning(delta.text)
        elif isinstance(delta, CallDelta):
            found.add_tool_call(delta.index, delta.name, delta.arguments)
    return found.result()
