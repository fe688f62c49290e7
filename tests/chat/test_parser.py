"""Answers taken apart as they come, held against canitoolcall: answers of models with what they mean."""

from collections.abc import Sequence

import pytest
from canitoolcall.checks import case_status, run_checks
from canitoolcall.chunking import ChunkStrategy, split_text
from canitoolcall.fixtures import Fixture, load_families, load_fixtures
from canitoolcall.results import Observation, ParseResult, Status, StreamAccumulator

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
# As their server may: the whole text, single characters, and pieces of 1 to 8, which tear markers apart.
SPLITS = [ChunkStrategy("one"), *(ChunkStrategy("char", seed) for seed in range(6))]


def parse(case: Fixture, pieces: Sequence[str]) -> ParseResult:
    reference = FAMILIES[case.family].reference_for(case.reference_model)
    assert reference is not None
    prompt = case.generation_prompt or reference.default_generation_prompt or ""
    parser = AnswerParser(SYNTAXES[case.reference_model], prompt, case.tools)
    found = StreamAccumulator()
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        if isinstance(delta, ContentDelta):
            found.add_content(delta.text)
        elif isinstance(delta, ReasoningDelta):
            found.add_reasoning(delta.text)
        elif isinstance(delta, CallDelta):
            found.add_tool_call(delta.index, delta.name, delta.arguments)
    return found.result()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_answer_means_what_its_model_says_it_means(case: Fixture) -> None:
    # a name that counts: "char" would be reported only
    streams = {f"rand:{n}": parse(case, split_text(case.raw_output, split)) for n, split in enumerate(SPLITS)}
    whole = parse(case, [case.raw_output])
    rows = run_checks(case, FAMILIES[case.family], Observation(whole, streams))
    assert case_status(rows) is Status.PASS, [row for row in rows if row.status is not Status.PASS]


def test_the_suite_is_whole() -> None:
    """So that a fixture that is renamed, or a family that moves, does not leave an empty test."""
    counts = {model: sum(case.reference_model == model for case in CASES) for model in SYNTAXES}
    assert counts == {
        "deepseek-ai/DeepSeek-V3-0324": 17, "deepseek-ai/DeepSeek-V3.1": 12, "deepseek-ai/DeepSeek-V3.2": 17,
        "deepseek-ai/DeepSeek-V4-Flash": 18, "zai-org/GLM-4.5": 19, "zai-org/GLM-4.7": 28, "zai-org/GLM-5.3": 4,
    }  # fmt: skip
