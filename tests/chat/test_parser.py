"""Answers taken apart as they come, held against canitoolcall: answers of models with what they mean."""

import pytest
from canitoolcall.checks import case_status, run_checks
from canitoolcall.chunking import ChunkStrategy, split_text
from canitoolcall.fixtures import Fixture
from canitoolcall.results import Observation, Status
from told_calls import CASES, FAMILIES, SYNTAXES, parse

# As their server may: the whole text, single characters, and pieces of 1 to 8, which tear markers apart.
SPLITS = [ChunkStrategy("one"), *(ChunkStrategy("char", seed) for seed in range(6))]


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
