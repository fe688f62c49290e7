"""A fleet: a Ray Serve application whose replicas each hold a placement group, one place for each rank of a model.

    serve run saccade.fleet.replicas:build_fleet model=MODEL tp=8 replicas=2

A replica's own process is rank 0. It starts an actor in each other place of its group and gives it the variables that
torchrun would; from there on all is as on any machines (docs/ranks.md). When a rank dies, its replica ends, and Ray
starts another. In front stands `Fleet`, which asks another replica where one could not answer. Needs the extra
`saccade[ray]`.
"""

import asyncio
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from saccade.api.llm import LLM
from saccade.api.outputs import Completion
from saccade.engine.params import SamplingParams
from saccade.errors import RankError, SaccadeError

TRIES = 4  # replicas that a request is given to, one after another, before it fails
RETRY_PAUSE = 1.0  # seconds before the next: the replicas that live are told apart from the others within a second
ONGOING = 64  # requests of a replica at the same time: LLM's max_requests


class RankHome(TypedDict):
    """Where a rank lives."""

    node: str
    address: str
    gpus: list[str]  # ids of the GPUs that Ray gave it; none on a CPU


class FleetAnswer(TypedDict):
    """A Completion as plain data."""

    text: str | None
    token_ids: list[int]
    finish_reason: str


def find_home() -> RankHome:
    context = ray.get_runtime_context()
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    return {"node": context.get_node_id(), "address": ray.util.get_node_ip_address(), "gpus": gpus}


def make_environments(homes: Sequence[RankHome], port: int) -> list[dict[str, str]]:
    """For each rank the variables that torchrun would set. Ranks of one machine see the GPUs of all of them, in the
    order of the ranks, because they read each other's memory."""
    local, seen = list[int](), Counter[str]()
    for home in homes:
        local.append(seen[home["node"]])
        seen[home["node"]] += 1
    environments = []
    for rank, home in enumerate(homes):
        gpus = [gpu for other in homes if other["node"] == home["node"] for gpu in other["gpus"]]
        environments.append(
            {
                "RANK": str(rank), "WORLD_SIZE": str(len(homes)), "LOCAL_RANK": str(local[rank]),
                "LOCAL_WORLD_SIZE": str(seen[home["node"]]), "MASTER_ADDR": homes[0]["address"],
                "MASTER_PORT": str(port),
            } | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        )  # fmt: skip
    return environments


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
    return port


class RankActor:
    """A rank other than the first, in a process of its own."""

    def find_home(self) -> RankHome:
        return find_home()

    def find_pid(self) -> int:
        return os.getpid()

    def follow(self, environment: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Do what rank 0 says. The process ends with it."""
        os.environ.update(environment)
        LLM(**options)


class Replica:
    """One copy of the model, on the ranks of one placement group."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options`: of LLM. RankError or another SaccadeError if it cannot be started."""
        group = ray.util.get_current_placement_group()
        self._actors = []
        for place in range(1, int(options.get("tp", 1))):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
            share = group.bundle_specs[place]
            actor = ray.remote(RankActor).options(
                num_cpus=share.get("CPU", 0), num_gpus=share.get("GPU", 0), scheduling_strategy=where
            )
            self._actors.append(actor.remote())
        self.pids: list[int] = ray.get([actor.find_pid.remote() for actor in self._actors])
        if self._actors:
            homes = [find_home(), *ray.get([actor.find_home.remote() for actor in self._actors])]
            own, *others = make_environments(homes, find_port())
            for actor, environment in zip(self._actors, others, strict=True):
                actor.follow.remote(environment, options)
            os.environ.update(own)
        self.llm = LLM(**options)

    async def generate(self, prompt: str | list[int], params: Mapping[str, Any]) -> FleetAnswer:
        with self._all_or_none():
            done = await asyncio.to_thread(self._generate, prompt, params)
        return {"text": done.text, "token_ids": done.token_ids, "finish_reason": done.finish_reason}

    def _generate(self, prompt: str | list[int], params: Mapping[str, Any]) -> Completion:
        return self.llm.generate([prompt], SamplingParams(**params))[0]

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """A rank that is gone ends the replica's process, so that Ray starts another at once. One that went on would
        refuse every request, and being idle, it would be given most of them."""
        try:
            yield
        except RankError as error:
            print(f"saccade: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    async def stream(self, prompt: str | list[int], params: Mapping[str, Any]) -> AsyncIterator[str]:
        """The text, piece by piece. A caller that goes away ends the request."""
        with self._all_or_none():
            stream = await asyncio.to_thread(self.llm.stream, prompt, SamplingParams(**params))
            try:
                while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                    yield piece.text
            finally:
                stream.close()

    def find_rank_pids(self) -> list[int]:
        """Processes of the ranks but the first, in their order."""
        return self.pids


class Fleet:
    """What clients ask: any replica that can answer."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def generate(self, prompt: str | list[int], params: Mapping[str, Any] | None = None) -> FleetAnswer:
        """A whole answer. `params`: fields of SamplingParams. A request whose replica dies is asked again, of another;
        without a seed its text may then be another."""
        for left in reversed(range(TRIES)):
            try:
                answer: FleetAnswer = await self._replicas.generate.remote(prompt, dict(params or {}))
                return answer
            except RayActorError:
                if not left:
                    raise
                await asyncio.sleep(RETRY_PAUSE)
        raise AssertionError("the last try returns or raises")

    async def stream(self, prompt: str | list[int], params: Mapping[str, Any] | None = None) -> AsyncIterator[str]:
        """The text, piece by piece. What has been sent cannot be taken back: a replica that dies ends the stream."""
        async for piece in self._replicas.stream.options(stream=True).remote(prompt, dict(params or {})):
            yield piece


def build_fleet(arguments: Mapping[str, Any]) -> Any:
    """The application, for `serve run` and serve's config files. Arguments: `replicas`, `gpus` and `cpus` of a rank
    (on GPUs 1 and 1), `strategy` of the placement ("STRICT_PACK": one machine; "PACK": as few as possible); the rest
    are LLM's: `model`, `tp`, `ep`, `speculate` and so on."""
    options = dict(arguments)
    replicas, strategy = int(options.pop("replicas", 1)), str(options.pop("strategy", "STRICT_PACK"))
    on_cpu = str(options.get("device", "auto")) == "cpu"
    share = {"CPU": float(options.pop("cpus", 1)), "GPU": float(options.pop("gpus", 0 if on_cpu else 1))}
    options |= {name: int(options[name]) for name in ("tp", "ep") if name in options}
    bundle = {name: amount for name, amount in share.items() if amount}
    if not bundle:
        raise SaccadeError("a rank needs a share of a CPU or GPU, found cpus=0 and gpus=0")
    replica = serve.deployment(
        Replica,
        num_replicas=replicas,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": share["CPU"], "num_gpus": share["GPU"]},
        placement_group_bundles=[bundle] * options.get("tp", 1),
        placement_group_strategy=strategy,
    )
    front = serve.deployment(Fleet, max_ongoing_requests=ONGOING * replicas, ray_actor_options={"num_cpus": 0.1})
    return front.bind(replica.bind(options))
