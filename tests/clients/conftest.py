"""Servers for other people's clients: the bundled model, and one that says what is written in scripted_server.py."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import ServedModel, serving

HELPERS = Path(__file__).parents[1] / "helpers" / "servers"
SOURCE = HELPERS.parents[2] / "src"


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    """The server's Python finds the package and the helpers; no client asks a proxy or the Hub."""
    os.environ["PYTHONPATH"] = f"{SOURCE}:{HELPERS}"
    os.environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}


@pytest.fixture(scope="session")
def bundled() -> Iterator[ServedModel]:
    with serving("--cache-tokens", "16384") as served:
        yield served


@pytest.fixture(scope="session")
def scripted() -> Iterator[ServedModel]:
    with serving(program="import scripted_server; scripted_server.main()") as served:
        yield served
