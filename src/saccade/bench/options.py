"""What an option of a benchmark is, and the options that several of them share.

An option is described once. `saccade bench` (typer) and `python -m saccade.bench` (argparse) are both made from it, and
the message that starts other ranks carries what was typed. Knows neither parser and no torch. Next: commands.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from saccade.api.settings.resolve import SETTING_LIMITS
from saccade.base.values import MOST_COUNT, is_count, show
from saccade.errors import RequestError

LLM_DEFAULT = "default"
MOST_REQUESTS, MOST_CHUNK = SETTING_LIMITS["max_requests"], SETTING_LIMITS["max_batch_tokens"]


class Option(NamedTuple):
    """`--name`, of what type, and which argument of the benchmark's function it is."""

    name: str  # with "_" for "-"
    help: str
    default: Any = None  # None: the function's own
    kind: type | None = None  # of the value; None: that of the default
    metavar: str | None = None
    argument: str = ""  # "": the name
    read: Callable[[str, Any], Any] | None = None  # what (name, value) stands for; RequestError for nonsense

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def value_type(self) -> type:
        """str, int, float, or bool for what is given or not."""
        return self.kind or (str if self.default is None else type(self.default))


def parse_counts(name: str, text: str, most: int = MOST_COUNT) -> list[int]:
    """ "1,4,8" -> [1, 4, 8], each `most` at most."""
    try:
        counts = [int(piece) for piece in text.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(is_count(count, 1) for count in counts):
        raise RequestError(f"{name}: expected integers of at least 1 with commas between, found {show(text)}")
    if max(counts) > most:
        raise RequestError(f"{name}: expected integers of {most:,} at most, found {show(text)}")
    return counts


def read_mixed_chunks(name: str, text: str) -> list[int | None]:
    """ "default,256" -> [None, 256]: None stands for what LLM has."""
    given = [piece.strip() for piece in text.split(",")]
    others = [piece for piece in given if piece != LLM_DEFAULT]
    numbers = iter(parse_counts(name, ",".join(others), MOST_CHUNK) if others else ())
    return [None if piece == LLM_DEFAULT else next(numbers) for piece in given]


def read_count(least: int, most: int) -> Callable[[str, Any], int]:
    """What reads an integer from `least` to `most`."""

    def read(name: str, value: Any) -> int:
        if not is_count(value, least) or value > most:
            raise RequestError(f"{name}: expected an integer from {least} to {most:,}, found {show(value)}")
        return int(value)

    return read


def split_names(name: str, text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",")]


def counts(name: str, default: str, help: str, argument: str, most: int = MOST_COUNT) -> Option:
    """An option of several numbers."""
    read = partial(parse_counts, most=most)
    return Option(name, f"{help}; several with commas.", default, argument=argument, read=read)


SHAPE_OPTION = Option(
    "shape",
    "v32, glm5, either with -rank-of-8, glm5-next-rank-of-8, glm5-next-rank-of-4 or bundled.",
    "v32-rank-of-8",
)
LAYERS_OPTION = Option("layers", "The first N layers only.", kind=int)
BATCH_OPTION = counts("batch", "1", "Requests of a step", "batches", MOST_REQUESTS)
CONTEXT_OPTION = counts("context", "8192", "Tokens of a request", "contexts")
ARRANGEMENT_OPTION = Option(
    "arrangement", "packed[-fp8], fused, two-streams, separate[-fp8] or reference; several with commas.",
    argument="arrangements", read=split_names,
)  # fmt: skip
REPEATS_OPTION = Option("repeats", "Samples.", 7)
TP_OPTION = Option("tp", "Ranks: a GPU each, or a process each with --device cpu.", 1, metavar="N")
EP_OPTION = Option("ep", "Of the ranks, so many divide the experts; divides tp.", 1)
CLIENTS_OPTION = counts("clients", "1,8,32,128", "Requests in flight", "clients", MOST_REQUESTS)
PROMPT_OPTION = Option("prompt", "Tokens of a request.", 64)
OUTPUT_OPTION = Option("output", "Tokens that follow.", 256)
CHUNK_OPTION = Option(
    "chunk", "Tokens of a step. Default: as LLM has it.", kind=int,
    read=read_count(1, MOST_CHUNK),
)  # fmt: skip
MIXED_CHUNKS_OPTION = Option(
    "chunk", f"Tokens of a step with decodes in it; {LLM_DEFAULT}: as LLM has it; several with commas.",
    f"{LLM_DEFAULT},256,1024,4096", argument="chunks", read=read_mixed_chunks,
)  # fmt: skip
ACTIVATIONS_OPTION = Option(
    "activations", 'What products of long prompts see of their inputs: "exact", "bf16", "fp8", or "auto".', "auto"
)
EXPERTS_OPTION = Option(
    "experts", "router; uniform: any as likely as any other; or recorded:FILE, of --record-experts.", "router"
)
RECORD_EXPERTS_OPTION = Option(
    "record_experts", "Write which experts each token chose, for --experts recorded:FILE.", metavar="FILE"
)
SEED_OPTION = Option("seed", "Of the synthetic weights.", 0, read=read_count(0, MOST_COUNT))
# Of every measurement of a device.
RUN_OPTIONS = (
    Option("device", '"auto" (cuda), "cuda:1" or, for small shapes, "cpu".', "auto"),
    Option("commit", "Of the sources, where there is no git."),
    Option("out", "Write the records there as JSON.", metavar="FILE"),
)
