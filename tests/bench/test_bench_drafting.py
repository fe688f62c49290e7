"""Steps with drafts in the benchmark: what is run, what it moves, and from which acceptance it pays."""

import json

import pytest
import torch

from saccade.api.loading.machine import make_drafter
from saccade.bench.bytes import count_bytes
from saccade.bench.rig import build_rig
from saccade.bench.shapes import find_shape
from saccade.bench.steps.decode import bench_decode, show_decode
from saccade.bench.steps.drafting import DraftSteps, count_draft_bytes, find_break_even, require_drafts
from saccade.bench.steps.eager import shuffle_pages
from saccade.bench.steps.fill import fill_caches
from saccade.bench.synthetic import plan_weights
from saccade.engine.pages import allocate_cache
from saccade.errors import RequestError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ratio", "drafts", "p"),
    [(1.5, 1, 0.5), (1.75, 2, 0.5), (1.0, 3, 0.0), (4.0, 3, 1.0), (4.1, 3, None), (0.9, 1, 0.0)],
)
def test_drafts_pay_from_where_they_give_as_many_tokens_as_they_cost(
    ratio: float, drafts: int, p: float | None
) -> None:
    assert find_break_even(ratio, drafts) == (None if p is None else pytest.approx(p, abs=1e-6))


def test_a_step_with_drafts_moves_the_layer_s_bytes_for_each() -> None:
    c = find_shape("v32-rank-of-8", 8).config
    one, two, three = (count_draft_bytes(c, 1, 8192, k) for k in (1, 2, 3))
    assert sum(count_bytes(c, 2, 8192).values()) < one < two < three
    layer = plan_weights(c, mtp=True).device_bytes - plan_weights(c).device_bytes
    assert 1.2e9 < layer < 1.8e9  # 256 experts of it, of which a token reads 8
    # a further draft: one more token in every layer, 8 more experts at most, and one more pass through layer and head
    assert 0.4e9 + 8 * 0.02e9 < three - two < 0.7e9 + 8 * 0.06e9


def test_a_record_tells_of_steps_with_drafts() -> None:
    options = dict(batches=(1, 2), contexts=(64,), steps=1, repeats=2, device="cpu", drafts=(1, 3))
    records = bench_decode("bundled", **options)  # type: ignore[arg-type]
    json.dumps(records)
    for record in records:
        assert [d["drafts"] for d in record["speculate"]] == [1, 3]
        for d in record["speculate"]:
            assert d["ratio"] == pytest.approx(d["step_ms"] / record["tpot_ms"]) and len(d["samples_ms"]) == 2
            assert d["pays_from"] == find_break_even(d["ratio"], d["drafts"]) and d["same_tokens_every_time"]
    text = show_decode(records)
    assert text.count("3 drafts: ") == 2 and "times a plain one" in text
    assert "speculate" not in bench_decode("bundled", **{**options, "batches": (1,), "drafts": ()})[0]  # type: ignore[arg-type]


def test_a_measured_step_is_a_whole_one_and_leaves_its_inputs() -> None:
    rig = build_rig("bundled", 2, CPU, mtp=True)
    calls: list[int] = []
    layer = rig.model.mtp
    assert layer is not None
    whole = layer.forward
    layer.forward = lambda batch, *args: calls.append(len(batch.tokens)) or whole(batch, *args)  # type: ignore
    cache, table = allocate_cache(rig.shape.config, 5, "auto", CPU, True), shuffle_pages(2, 2, CPU)
    fill_caches(cache, table, 100, None)
    steps = DraftSteps(make_drafter(rig.model), cache, table, 100, 3, rig.shape.config.vocab_size)
    assert calls == [8, 2, 2]  # two requests: a token and three drafts each, then two more drafts
    assert steps.run().equal(steps.tokens) and steps.tokens.shape == (8 + 2 * 3,)  # type: ignore[attr-defined]


def test_senseless_drafts_are_refused() -> None:
    for drafts, context in (((0,), 100), ((6,), 100), ((5,), 10)):
        with pytest.raises(RequestError, match="speculate: expected 1 to 5 drafts"):
            require_drafts(drafts, context)
