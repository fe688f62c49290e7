"""What `bench decode` and `bench prefill` say of GLM-5.3-Flash: with its states; all else is refused."""

import pytest

from saccade.bench import shapes
from saccade.bench.bytes import count_bytes, count_operations
from saccade.bench.shapes import FLASH_SHAPES, find_shape
from saccade.bench.steps.chunks import bench_chunks
from saccade.bench.steps.decode import bench_decode, show_decode
from saccade.bench.steps.prefill import bench_prefill, show_prefill
from saccade.bench.steps.traffic import bench_engine
from saccade.bench.synthetic import plan_weights
from saccade.errors import RequestError
from saccade.models.cache_rows import count_state_bytes
from saccade.models.registry import find_cache_rows

RANK = "glm5-next-rank-of-8"
SMALL = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "index_n_heads": 4, "index_head_dim": 64, "index_topk": 16, "linear_num_heads": 2, "linear_head_dim": 32,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.ONE_RANK_SHAPES, RANK, shapes.FLASH_RANK | SMALL)


def test_steps_begin_with_the_states_of_a_prefill_and_repeat(small: None) -> None:
    (record,) = bench_decode(RANK, 5, (2,), (70,), steps=9, repeats=3, device="cpu")
    assert record["same_tokens_every_time"] and record["cache"] == "a prefill of 61 random tokens for each request"
    config = find_shape(RANK, 5, with_flash=True).config
    states = count_state_bytes(find_cache_rows(config, mtp=False))
    assert record["bytes_by_matrix"]["states"] == 2 * 2 * states
    assert RANK in show_decode([record])


def test_steps_with_drafts_begin_with_the_same_states(small: None) -> None:
    """A request reads and writes its states once, however many tokens it has."""
    (record,) = bench_decode(RANK, 5, (2,), (70,), steps=9, repeats=3, device="cpu", drafts=(1, 3))
    assert record["same_tokens_every_time"] and all(d["same_tokens_every_time"] for d in record["speculate"])
    config = find_shape(RANK, 5, with_flash=True).config
    states = count_bytes(config, 8, 70, requests=2)["states"]
    assert states == count_bytes(config, 2, 70)["states"] == record["bytes_by_matrix"]["states"]
    with pytest.raises(RequestError, match="steps: expected 6 or more"):
        bench_decode(RANK, 5, (2,), (70,), steps=5, device="cpu", drafts=(3,))


def test_a_prompt_is_measured_from_empty_states(small: None) -> None:
    (record,) = bench_prefill(RANK, 5, (50,), chunk=16, repeats=2, device="cpu")
    assert record["same_tokens_every_time"] and record["operations"]["recurrence"] > 0
    assert RANK in show_prefill([record])


def test_an_engine_whose_requests_have_states_is_measured(small: None) -> None:
    (record,) = bench_engine(RANK, 5, (2,), prompt=20, output=3, device="cpu")
    assert record["requests"] >= 4 and record["distinct_experts"] > 0
    (record,) = bench_chunks(RANK, 5, (16,), decodes=2, context=40, repeats=1, device="cpu")
    assert record["steps"] >= 3 and record["distinct_experts"] > 0


def test_the_share_of_a_rank_is_planned_as_the_published_layout_stores_it() -> None:
    plan = plan_weights(find_shape(RANK, 4, with_flash=True).config)
    held = {name: None if s.encoding is None else s.encoding.name for name, s in plan.stored.items()}
    assert held["model.layers.3.self_attn.o_proj"] == "FP8 128x128"
    assert held["model.layers.0.self_attn.o_proj"] is None and held["model.layers.3.self_attn.indexer.wq_b"] is None
    config = find_shape(RANK, with_flash=True).config
    counted = count_bytes(config, 1, 8192)
    # In MB: head 159, 34 recurrent layers 1,232, 11 that attend 430, 3 MLPs 57, 42 mixtures 1,288, streams 71,
    # states 46, latents and keys 29.
    assert sum(counted.values()) == pytest.approx(3.312e9, rel=0.002)
    assert counted["states"] == pytest.approx(2 * 22.9e6, rel=0.01)
    assert count_operations(config, 8192)["recurrence"] == 7 * 8192 * 34 * 8 * 128 * 128


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"arrangements": ["two-streams"]},
            "two-streams is of DeepSeek's indexer; of glm5-next-rank-of-8 there is packed",
        ),
    ],
)
def test_what_is_not_measured_is_refused(options: dict[str, list[object]], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        bench_decode(RANK, 4, device="cpu", **options)  # type: ignore[arg-type]
    for name in FLASH_SHAPES:
        with pytest.raises(RequestError, match="not measured by this command, but by bench decode, prefill, engine"):
            find_shape(name)
