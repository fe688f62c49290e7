"""A measurement by many ranks: rank 0 starts the others on this machine, and all run the same command.

Every rank goes through the same steps and measures them; rank 0 alone prints. Under torchrun nothing is started: each
of its processes is a rank. A rank that ends early ends all. Knows no models. Next: parallel/device.py.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from saccade.api.settings.devices import RANK_LIMIT
from saccade.errors import RequestError
from saccade.models.parameters import Layout
from saccade.parallel.ranks import ONE_RANK, Ranks

JOIN_TIMEOUT = timedelta(minutes=30)  # of a collective: weights of 61 layers are made, kernels compiled
VARIABLES_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them

SHARING = "SACCADE_SHARED_DEVICES"  # "1": ranks of a benchmark may share a GPU: it runs, its times say nothing


@contextmanager
def join_bench_ranks(command: str, asked: Mapping[str, Any]) -> Iterator[Ranks]:
    """This process as one of `asked["tp"]` ranks, 1 if it is not there; as rank 0, if nobody started it as another one,
    it starts those with the same command and options. RequestError for layouts and devices that do not fit."""
    tp, ep, device = asked.get("tp", 1), asked.get("ep", 1), asked["device"]
    if not 1 <= tp <= RANK_LIMIT or ep < 1 or tp % ep:
        raise RequestError(
            f"tp and ep: expected up to {RANK_LIMIT} ranks, and a number that divides them, found --tp {tp} --ep {ep}"
        )
    found = os.environ.get("WORLD_SIZE", str(tp)) if "RANK" in os.environ else str(tp)
    if found != str(tp):
        raise RequestError(f"tp: torchrun started {found} ranks, --tp says {tp}")
    if tp == 1:
        yield ONE_RANK
        return
    require_devices(device, tp)
    if "RANK" in os.environ:
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, tp, False, timedelta(minutes=5), wait_for_workers=False)
        with joined(store, Layout(tp, ep, rank), device, local) as ranks:
            yield ranks
        return
    store = TCPStore("127.0.0.1", 0, tp, True, timedelta(minutes=5), wait_for_workers=False)
    with started(command, asked, store.port), joined(store, Layout(tp, ep, 0), device, 0) as ranks:
        yield ranks


@contextmanager
def joined(store: TCPStore, layout: Layout, device: str, local: int) -> Iterator[Ranks]:
    """This rank, until all have come to the end of the block."""
    if device == "cpu":
        from saccade.parallel.distributed import DistributedRanks, join_gloo

        plain = DistributedRanks(layout, join_gloo(store, layout, JOIN_TIMEOUT))
        yield plain
        plain.collect("")
        return
    from saccade.parallel.device import join_devices

    ranks = join_devices(store, layout, torch.device("cuda", local % torch.cuda.device_count()), JOIN_TIMEOUT)
    yield ranks
    ranks.check()
    ranks.collect("")
    ranks.close()


def require_devices(device: str, tp: int) -> None:
    """RequestError unless each of this machine's ranks has a device of its own, or may share one."""
    if device == "cpu":
        return
    if device not in ("auto", "cuda"):
        raise RequestError(f"device: {tp} ranks take the first devices: expected cuda or cpu, found {device}")
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", tp))
    if count < local and not (count and os.environ.get(SHARING) == "1"):
        raise RequestError(f"tp: {local} ranks of this machine need {local} CUDA devices, torch finds {count}")


@contextmanager
def started(command: str, asked: Mapping[str, Any], port: int) -> Iterator[None]:
    """Ranks 1 to tp - 1, which run the same command; they end with the block, and all end if one of them fails."""
    children, tp = [], asked["tp"]
    for rank in range(1, tp):
        values = (rank, tp, rank, "127.0.0.1", port)
        own = {name: str(value) for name, value in zip(VARIABLES_OF_RANKS, values, strict=True)}
        line = [
            sys.executable,
            "-m",
            "saccade.bench.ranks.other_rank",
            command,
            json.dumps(dict(asked)),
            str(os.getpid()),
        ]
        env = os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        children.append(subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    is_over = threading.Event()
    threading.Thread(target=watch_children, args=(children, is_over), daemon=True).start()
    try:
        yield
        is_over.set()
        for child in children:
            child.wait(60)
    finally:
        is_over.set()
        for child in children:
            child.kill()
            child.wait()


def watch_children(children: Sequence["subprocess.Popen[bytes]"], is_over: threading.Event) -> None:
    """End this process, which may wait for it in a sum, when a rank has failed."""
    while not is_over.wait(0.2):
        for rank, child in enumerate(children, 1):
            code = child.poll()
            if code is not None and not is_over.is_set():
                print(f"saccade: rank {rank} ended with code {code}; all ranks end", file=sys.stderr, flush=True)
                for other in children:
                    other.kill()
                os._exit(3)
