"""Messages between the process that speaks HTTP and the one that runs the engine, and how they are framed.

Plain data over a socket pair: four bytes of length, then a pickle. Both ends are ours, so nothing foreign is unpickled.
Knows no torch. Next: process.py and client.py, the two ends.
"""

import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from saccade.engine.params import SamplingParams

LENGTH = struct.Struct(">I")


class Submit(NamedTuple):
    """A prompt to answer; `id` is the sender's."""

    id: int
    tokens: list[int]
    params: SamplingParams
    capture: bool = False  # where the answer looked is wanted


class Cancel(NamedTuple):
    """Nobody waits for these any more."""

    ids: tuple[int, ...]


class Ping(NamedTuple):
    """Are you there?"""


class LoadProgress(NamedTuple):
    """Bytes of the weights so far, and in all."""

    verb: str
    done: int
    total: int


class Note(NamedTuple):
    """A line for people."""

    text: str


class Refused(NamedTuple):
    """The model cannot be run: why, and the exit code that says so."""

    text: str
    code: int


class Ready(NamedTuple):
    """The model is loaded: what the server has to know of it."""

    path: str  # the directory of its files
    config: Any  # a Config
    max_length: int  # tokens of prompt and answer
    capacity: int  # rows of the cache that one request can own
    max_requests: int
    eos_token_ids: tuple[int, ...]
    speculate: int | str
    loaded: str  # one line on what was loaded

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer can have: of the context, and of the cache, where the last token of an
        answer needs no row."""
        return min(self.max_length, self.capacity + 1)


class Taken(NamedTuple):
    """A prompt waits or runs; or it was refused, and why."""

    id: int
    refusal: str | None = None
    is_bug: bool = False  # of the engine, and not the request's fault


class Counts(NamedTuple):
    """What an answer cost less than it might have; drafts are told with its last piece."""

    cached: int = 0  # prompt tokens that were in the cache
    drafted: int = 0
    accepted: int = 0


TokenRow = tuple[int, float, list[tuple[int, float]]]  # a token, its log-probability, and the likeliest with theirs


class Looked(NamedTuple):
    """A whole answer, and which places were seen when each of its tokens was chosen, by layer."""

    tokens: list[int]
    selected: list[list[list[int]]]


class Delta(NamedTuple):
    """What one or several steps added to an answer. The last one has a reason, or an error."""

    tokens: list[int]
    text: str
    logprobs: list[TokenRow] | None = None
    finish_reason: str | None = None
    error: str | None = None
    counts: Counts = Counts()
    prompt_logprobs: list[TokenRow] | None = None  # of all tokens but the first, with the first tokens of the answer
    looked: Looked | None = None  # with the last piece, if it was wanted
    error_kind: str = "failed"  # or "not_finite", or "no_answer": grammar and options left no token to choose

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is; sums are since its start."""

    running: int = 0
    waiting: int = 0
    pages: int = 0  # that requests can own
    free_pages: int = 0
    steps: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    prefix_hits: int = 0  # tokens of prompts that were in the cache
    prefix_asked: int = 0  # tokens of prompts that were looked for there
    prefix_pages: int = 0  # that are kept now
    prefix_evictions: int = 0


class Stepped(NamedTuple):
    """What came of a step, by request, and how busy the engine is now."""

    deltas: list[tuple[int, Delta]]
    load: Load


class Pong(NamedTuple):
    """`busy`: seconds since the step under way began; 0 between steps."""

    busy: float


class Failed(NamedTuple):
    """The engine ends, and why."""

    text: str


def pack(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


def receive(link: socket.socket) -> Any:
    """The next message; EOFError if the other end is gone."""
    (size,) = LENGTH.unpack(read_exactly(link, LENGTH.size))
    return pickle.loads(read_exactly(link, size))


def read_exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = link.recv(min(size - len(parts), 1 << 20))
        except ConnectionResetError:
            part = b""
        if not part:
            raise EOFError("the other process is gone")
        parts += part
    return bytes(parts)
