"""Two agents of torchrun on this machine, that start the ranks of one model, as two machines would."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Agent(NamedTuple):
    code: int
    out: str
    err: str


def run_agents(arguments: Sequence[Sequence[str]], folders: Sequence[Path | None] = (None, None)) -> list[Agent]:
    """`saccade ARGUMENTS` on each of two nodes with one rank each, in a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents = []
    for node, (words, folder) in enumerate(zip(arguments, folders, strict=True)):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
            str(node), "--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", str(port), "-m",
            "saccade", *words,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        agents.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
            )
        )
    found = []
    for agent in agents:
        try:
            out, err = agent.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            agent.kill()
            out, err = agent.communicate()
        found.append(Agent(agent.returncode, out, err))
    return found
