"""What explains a difference: formats within the size of rounding are told from rounding, also several at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from saccade.api.llm import LLM
from saccade.compare.bars import Votes
from saccade.compare.compare import Comparer
from saccade.compare.explain import MOST_CAUSES, Explainer, find_selection_bar
from saccade.compare.local import LocalAnswers
from saccade.compare.questions import draw_questions
from saccade.compare.report import ComparisonReport
from saccade.compare.scoring import Forced, ScoredText, force
from saccade.compare.variants.table import AS_STORED, Variant, combine, list_hypotheses, list_number_formats
from saccade.eval.tasks import draw_test
from saccade.models.dsa.transformer import Transformer

TOKENS = 800


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", mtp=False)


def draw(seed: int, size: float, flips: float = 0.01) -> Tensor:
    """Differences as rounding makes them: each token has its own size, and one of a hundred moves far."""
    source = torch.Generator().manual_seed(seed)
    sizes = size * torch.exp(1.5 * torch.randn(TOKENS, generator=source))
    sizes[torch.rand(TOKENS, generator=source) < flips] *= 100
    return sizes * torch.randn(TOKENS, generator=source)


def explain(theirs: Tensor, steps: dict[str, Tensor]) -> list[str]:
    """Names of what explains `theirs` on a checkpoint that says 0 everywhere; `steps`: by how much each moves it."""
    variants = [Variant("format", name, name, name) for name in steps]

    def say(variant: Variant, tokens: Sequence[int]) -> Forced:
        return Forced(sum((steps[name] for name in variant.name.split("+")), torch.zeros(TOKENS)), [])

    text = ScoredText("text", list(range(TOKENS + 1)), 1, theirs, Forced(torch.zeros(TOKENS), []))
    causes = Explainer([text], say, [[draw(98, 1e-3)], [draw(99, 4e-3)]], lambda _: None).find(variants)[1]
    return [cause.variant.name for cause in causes]


def test_a_cause_is_found_below_the_noise_and_noise_is_no_cause() -> None:
    steps = {name: draw(seed, 3e-4) for seed, name in enumerate(("keys", "latents", "head", "norms"))}
    for seed in range(20, 30):
        noise = draw(seed, 6e-4)
        assert explain(noise, steps) == []
        assert explain(noise + steps["latents"], steps) == ["latents"]  # half as large as the noise
    assert set(explain(noise + steps["latents"] + steps["keys"], steps)) == {"latents", "keys"}
    assert len(explain(sum(steps.values(), torch.zeros(TOKENS)), steps)) == MOST_CAUSES


def test_what_rounding_does_as_well_is_no_cause() -> None:
    """Near ties that both flip: nearer than the checkpoint, but no nearer than to a run that only rounds."""
    run = draw(98, 1e-3)  # the first of `explain`
    assert explain(draw(30, 1e-4) + run, {"ties": 0.8 * run}) == []
    assert explain(draw(30, 1e-4) + draw(31, 1e-3), {"ties": 0.8 * draw(31, 1e-3)}) == ["ties"]


def test_what_points_there_but_goes_too_far_is_no_cause() -> None:
    step = draw(40, 1e-3)
    assert explain(draw(41, 1e-4) + step, {"thrice": 3 * step}) == [] != explain(draw(41, 1e-4) + step, {"once": step})


def test_a_gain_does_not_depend_on_sizes() -> None:
    was, left = draw(1, 1e-2), draw(2, 3e-3)
    gain, larger = Votes.of([was], [left]), Votes.of([was * 100], [left * 100])
    assert abs(gain.mean - larger.mean) < 1e-2 and gain.mean > 0.25 and gain.is_sure
    was[0] = 50.0  # one token counts as one token
    assert abs(Votes.of([was], [left]).mean - gain.mean) < 3 / TOKENS
    assert Votes.of([was], [was]) == (0, 0) and not Votes.of([left], [was]).is_sure
    assert Votes.of([], []) == (0, 1) and not Votes.of([was[:15]], [was[:15] * 0]).is_sure  # too few tokens


def test_few_tokens_are_sure_of_nothing_by_chance() -> None:
    some = slice(0, 64)
    for seed in range(50, 90):
        noise, step, moved = (draw(seed + shift, 1e-3)[some] for shift in (0, 100, 200))
        assert not Votes.along([noise], [step], [moved]).is_sure
        assert Votes.along([noise / 4 + step], [step], [moved]).is_sure


def test_differences_that_begin_where_an_indexer_chooses_are_no_rounding() -> None:
    def text(theirs: Tensor, prompt: int = 1) -> ScoredText:
        return ScoredText("text", list(range(TOKENS + 1)), prompt, theirs, Forced(torch.zeros(TOKENS), []))

    run, theirs = draw(97, 4e-3), draw(96, 4e-3)
    assert find_selection_bar([text(theirs)], [run], 64) is None
    theirs[:64] *= 0.05
    assert find_selection_bar([text(theirs)], [run], 64) == theirs[:64].abs().max()
    assert find_selection_bar([text(theirs)], [run], TOKENS + 1) is None  # no text is long enough
    answer = theirs[64:]  # of a prompt that is not echoed
    assert find_selection_bar([text(answer, TOKENS + 1 - len(answer))], [run[64:]], 64) is None


def compare(llm: LLM, **how: str) -> ComparisonReport:
    asked = draw_questions(llm)[1:3]  # what is asked without a file
    return Comparer(llm).compare(LocalAnswers(LLM(mtp=False, cache_tokens=4096, **how)), asked, 8)


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ({"index_cache": "fp8"}, ["fp8-index-keys"]),
        ({"latent_cache": "fp8"}, ["fp8-latents"]),
        ({"latent_cache": "fp8", "index_cache": "fp8"}, ["fp8-index-keys", "fp8-latents"]),
        pytest.param({"activations": "bf16"}, [], marks=pytest.mark.soak),  # fp8 rounds more
        ({"activations": "fp8"}, []),
    ],
)
def test_fp8_caches_are_named_and_rounding_is_not(llm: LLM, how: dict[str, str], names: list[str]) -> None:
    report = compare(llm, **how)
    assert sorted(finding.name for finding in report.findings) == names, report
    for finding in report.findings:
        assert finding.kind == "format" and finding.departure is not None and finding.departure.explained is not None
        left = abs(finding.departure.theirs - finding.departure.explained)
        assert abs(finding.departure.theirs - finding.departure.checkpoint) > left
        assert finding.place == finding.departure.place
    if names == ["fp8-latents"]:  # less than the bar of rounding: its size alone does not show it
        assert report.rounding == "bf16" and report.findings[0].place is not None and report.findings[0].place < 64


def test_variants_combine(llm: LLM) -> None:
    """Latents and index keys in FP8 at once are what a model with both caches says."""
    assert isinstance(llm.model, Transformer)
    formats = {variant.name: variant for variant in list_number_formats()}
    tokens = llm.encode(draw_test("recall", 1, 192).prompt)
    both = combine([formats["fp8-latents"], formats["fp8-index-keys"]])
    assert (both.name, both.kind) == ("fp8-latents+fp8-index-keys", "format")
    exact, one, two = (say(llm.model, v, tokens) for v in (AS_STORED, formats["fp8-index-keys"], both))
    real = torch.tensor(LLM(mtp=False, index_cache="fp8", latent_cache="fp8").score(tokens))
    assert (real - two).abs().max() < 1e-4 < 1e-3 < min((real - other).abs().max() for other in (exact, one))
    last = list(list_hypotheses(llm.model, {}))[-1]
    assert combine([last, formats["fp8-latents"]]).overrides[-1] is last.overrides[0]  # formats are the outermost


def say(model: Transformer, variant: Variant, tokens: list[int]) -> Tensor:
    return force(model, variant, tokens, "cpu").logprobs
