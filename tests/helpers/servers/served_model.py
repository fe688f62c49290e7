"""A server in a process of its own, and what it says."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx

PYTHON = os.environ.get("SACCADE_PYTHON", sys.executable)  # of the server: clients have an environment of their own
QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
ANSWER = "\n12 + 7 = 19\n#### 19"
PROGRAM = """
import sys
from saccade.server.run import run_server
from saccade.server.settings import ServeSettings
say = lambda line: print(line, file=sys.stderr, flush=True)
sys.exit(run_server({"path": None, "cache_tokens": 8192}, ServeSettings(port=0, red_time=1.0), say, lambda *told: None))
"""


class ServedModel:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log: Any) -> None:
        self.process, self.url, self._log = process, url, log
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def measure(self, name: str) -> float:
        """One number of /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def wait_for(self, name: str, value: float) -> None:
        """Until a number of /metrics has a value; at most 10 s."""
        for _ in range(200):
            if self.measure(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.measure(name)}, not {value}")

    def find_engine(self) -> int:
        """The id of its engine's process."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()


@contextmanager
def serving(*options: str, program: str | None = None) -> Iterator[ServedModel]:
    """`saccade serve` on a free port, or a `program` that serves."""
    line = ["-c", program] if program else ["-m", "saccade", "serve", "--port", "0", *options]
    with TemporaryFile() as log:
        process = subprocess.Popen([PYTHON, *line], stderr=log)
        try:
            for _ in range(1200):
                log.seek(0)
                found = [text for text in log.read().decode().splitlines() if text.startswith("serving ")]
                if found or process.poll() is not None:
                    break
                time.sleep(0.05)
            log.seek(0)
            assert found, log.read().decode()
            served = ServedModel(process, found[0].rpartition(" ")[2], log)
            with served.client:
                yield served
        finally:
            process.kill()
            process.wait()


def read_events(text: str) -> list[str]:
    """The data of each server-sent event."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
