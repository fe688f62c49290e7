"""A fleet on this machine: two replicas of two ranks each on CPUs, by Ray Serve; and one rank is killed."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from saccade import LLM, SamplingParams
from saccade.checkpoint.open import bundled_path

ray = pytest.importorskip("ray", reason="the extra saccade[ray] is not installed")

from saccade.fleet.replicas import build_fleet, make_environments  # noqa: E402

LIMIT = 240  # seconds until a test that hangs fails
PARAMS = {"max_tokens": 24, "temperature": 0.0}


def test_ranks_of_one_machine_see_each_other_s_gpus() -> None:
    homes: Any = [
        {"node": "a", "address": "10.0.0.1", "gpus": ["2"]},
        {"node": "a", "address": "10.0.0.1", "gpus": ["5"]},
        {"node": "b", "address": "10.0.0.2", "gpus": ["0"]},
    ]
    told = make_environments(homes, 1234)
    assert [t["CUDA_VISIBLE_DEVICES"] for t in told] == ["2,5", "2,5", "0"]
    assert [(t["RANK"], t["LOCAL_RANK"], t["LOCAL_WORLD_SIZE"]) for t in told] == [
        ("0", "0", "2"), ("1", "1", "2"), ("2", "0", "1"),
    ]  # fmt: skip
    assert {(t["WORLD_SIZE"], t["MASTER_ADDR"], t["MASTER_PORT"]) for t in told} == {("3", "10.0.0.1", "1234")}


@pytest.fixture
def fleet() -> Iterator[Any]:
    from ray import serve

    environment = {"PYTHONPATH": os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)}
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": environment | {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    try:
        yield lambda **arguments: serve.run(build_fleet(arguments), route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.soak
def test_a_killed_rank_loses_no_request_and_its_replica_comes_back(fleet: Any) -> None:
    from ray import serve

    handle = fleet(model=str(bundled_path()), tp=2, replicas=2, device="cpu", cpus=0.5)
    prompts = [f"Lucy has {i % 17 + 2} boxes with {i % 5 + 3} pencils each." for i in range(200)]
    asked = [handle.generate.remote(prompt, PARAMS) for prompt in prompts]
    replica = serve.get_deployment_handle("Replica", app_name="default")
    pids = {pid for _ in range(20) for pid in replica.find_rank_pids.remote().result(timeout_s=LIMIT)}
    assert len(pids) == 2  # one rank beside the first of each replica
    time.sleep(1.0)
    os.kill(min(pids), signal.SIGKILL)
    answers = [one.result(timeout_s=LIMIT) for one in asked]
    with LLM(bundled_path(), device="cpu") as llm:
        alone = llm.generate(prompts, SamplingParams(**PARAMS))
    same = sum(a["token_ids"] == b.token_ids for a, b in zip(answers, alone, strict=True))
    assert len(answers) == 200 and same >= 198  # two ranks add up in another order: BF16 weights, near ties
    end = time.monotonic() + LIMIT
    while len(found := {p for _ in range(20) for p in replica.find_rank_pids.remote().result(timeout_s=LIMIT)}) < 2:
        assert time.monotonic() < end, "the replica did not come back"
        time.sleep(1.0)
    assert min(pids) not in found and max(pids) in found
