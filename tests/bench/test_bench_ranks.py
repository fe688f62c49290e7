"""Measurements by several ranks, here processes over gloo; on GPUs see tests/gpu/test_gpu_ranks.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import Run

from saccade.bench.bytes import HELD, count_bytes
from saccade.bench.ranks.join import join_bench_ranks
from saccade.bench.shapes import find_shape
from saccade.bench.synthetic import find_shared, make_weights, plan_weights
from saccade.errors import RequestError
from saccade.models.parameters import Layout
from saccade.parallel.ranks import ONE_RANK


def test_whole_shapes_are_those_that_a_rank_has_its_share_of() -> None:
    for name, heads, experts_columns, vocabulary in (("v32", 128, 2048, 129280), ("glm5", 64, 2048, 154880)):
        whole, rank = find_shape(name, 4).config, find_shape(f"{name}-rank-of-8", 4).config
        found = whole.num_attention_heads, whole.moe_intermediate_size, whole.vocab_size
        assert found == (heads, experts_columns, vocabulary)
        assert plan_weights(whole, layout=Layout(8, 1, 3)).device_bytes == plan_weights(rank).device_bytes


def test_a_rank_moves_its_share_of_the_bytes() -> None:
    config = find_shape("v32", 5).config
    one, eight = (count_bytes(config, 1, 8192, 8.0, HELD._replace(layout=Layout(tp))) for tp in (1, 8))
    assert eight["o_proj"] * 8 == pytest.approx(one["o_proj"]) and eight["qkv_a_proj"] == one["qkv_a_proj"]
    apart = count_bytes(config, 1, 8192, 8.0, HELD._replace(layout=Layout(8, 8)))
    assert apart["experts.gate_up_proj"] == pytest.approx(eight["experts.gate_up_proj"], rel=1e-3)


def test_ranks_draw_the_same_for_what_all_hold_and_their_own_for_shares() -> None:
    config = find_shape("bundled", 2).config
    plans = [plan_weights(config, layout=Layout(2, 2, rank)) for rank in range(2)]
    first, second = (make_weights(plan, "cpu").held for plan in plans)
    shared = find_shared(plans[0])
    assert {n.rpartition(".")[2] for n in shared} >= {"qkv_a_proj", "wk_weights_proj", "gate", "bias"}
    for name, tensor in first.items():
        same = tensor.view(torch.uint8).equal(second[name].view(torch.uint8))
        assert same == (name in shared) or name.endswith(".scale"), name


def test_layouts_and_devices_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(match: str, tp: int, ep: int = 1, device: str = "cpu") -> None:
        asked = {"tp": tp, "ep": ep, "device": device}
        with pytest.raises(RequestError, match=match), join_bench_ranks("decode", asked):
            pass

    refuse("a number that divides them, found --tp 4 --ep 3", 4, 3)
    refuse("found --tp 0", 0)
    refuse("expected cuda or cpu, found cuda:1", 2, device="cuda:1")
    if not torch.cuda.is_available():
        refuse("need 2 CUDA devices, torch finds 0", 2, device="auto")
    with join_bench_ranks("host", {"device": "cpu"}) as ranks:
        assert ranks is ONE_RANK
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuse("torchrun started 3 ranks, --tp says 2", 2)


def test_two_ranks_measure_a_step_and_their_sums() -> None:
    command = [sys.executable, "-m", "saccade.bench", "decode", "--shape", "bundled", "--layers", "2", "--tp", "2"]
    command += ["--ep", "2", "--device", "cpu", "--repeats", "1", "--steps", "2", "--context", "70", "--json"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (record,) = json.loads(ran.stdout)
    assert (record["tp"], record["ep"], record["shape"]) == (2, 2, "bundled") and record["tpot_ms"] > 0


def test_one_rank_has_no_sums_to_measure(run: Run) -> None:
    ran = run("bench", "allreduce", "--tp", "1", "--device", "cpu")
    assert ran.code == 2 and "allreduce needs ranks: --tp 2, or more" in ran.err
