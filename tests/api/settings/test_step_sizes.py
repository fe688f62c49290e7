"""Tokens of a step beside decodes, by the sizes of published models: the same number in every run and on every rank."""

from types import SimpleNamespace
from typing import Any

import pytest
from published_configs import deepseek_v32_config, glm5_config, glm53_flash_config

from saccade.api.settings.step_sizes import BASE, LONGEST_GAP, RATE, choose_mixed_tokens
from saccade.checkpoint.open import bundled_path, open_model
from saccade.engine.buffers import round_to_bucket
from saccade.models.parameters import Extras, Layout
from saccade.models.registry import find_family
from saccade.plan import make_plan
from saccade.plan.active import count_active_numbers


def count(values: dict[str, Any], at: Layout, mtp: bool = True) -> int:
    family = find_family(values["model_type"])
    config: Any = family.read_config(values, "config.json", ())
    plan: Any = SimpleNamespace(config=config, params=tuple(family.parameters(config, at, Extras(mtp=mtp))))
    return count_active_numbers(plan)


@pytest.mark.parametrize(
    ("build", "tp", "exact", "bf16", "fp8"),
    [
        (deepseek_v32_config, 8, 768, 1792, 2048),
        (deepseek_v32_config, 16, 1280, 2560, 3584),
        (glm5_config, 8, 768, 1536, 2048),
        (glm53_flash_config, 8, 2048, 4096, 4096),
        (glm53_flash_config, 4, 1024, 2560, 3072),
        (deepseek_v32_config, 1, 256, 256, 256),  # the least: it takes 240 ms
    ],
)
def test_the_default_of_published_models(build: Any, tp: int, exact: int, bf16: int, fp8: int) -> None:
    active = count(build(), Layout(tp))
    found = [choose_mixed_tokens("cuda", active, how, 4096) for how in ("exact", "bf16", "fp8")]
    assert found == [exact, bf16, fp8]
    assert all(round_to_bucket(size) == size for size in found)  # no row of a step is padding
    assert exact == 256 or BASE + 2 * active / RATE * exact <= LONGEST_GAP
    assert choose_mixed_tokens("cuda", active, "exact", 200) == choose_mixed_tokens("cpu", active, "exact", 200) == 200


def test_all_ranks_and_runs_with_and_without_drafts_have_the_same() -> None:
    values = deepseek_v32_config()
    one = count(values, Layout(8))
    assert {count(values, Layout(8, 1, 7)), count(values, Layout(8, 8, 3)), count(values, Layout(8), False)} == {one}


def test_a_token_meets_the_experts_that_it_chooses() -> None:
    """37 billion parameters of DeepSeek-V3.2 are published as active; embedding and head are 0.93 billion each, of which
    the head counts there."""
    assert count(deepseek_v32_config(), Layout()) == pytest.approx(36.55e9, rel=1e-3)


def test_the_bundled_model_has_one_limit_on_a_gpu_too() -> None:
    active = count_active_numbers(make_plan(*open_model(bundled_path())))
    assert active == pytest.approx(6.3e6, rel=0.01)
    assert choose_mixed_tokens("cuda", active, "exact", 4096) == 4096
