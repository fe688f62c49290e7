"""The benchmarks of a device, each described once: its options, its module, what it measures.

`saccade bench` and `python -m saccade.bench` are made from this table, and run what stands here. A benchmark NAME has
the functions `bench_NAME` -> records and `show_NAME` -> table in its module, which is imported when it is asked for:
the table needs no torch. Knows neither typer nor argparse. Next: options.py; a module of the table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.base.json_text import to_json
from saccade.base.limits import THREAD_LIMIT
from saccade.bench.options import (
    ACTIVATIONS_OPTION,
    ARRANGEMENT_OPTION,
    BATCH_OPTION,
    CHUNK_OPTION,
    CLIENTS_OPTION,
    CONTEXT_OPTION,
    EP_OPTION,
    EXPERTS_OPTION,
    LAYERS_OPTION,
    MIXED_CHUNKS_OPTION,
    MOST_REQUESTS,
    OUTPUT_OPTION,
    PROMPT_OPTION,
    RECORD_EXPERTS_OPTION,
    REPEATS_OPTION,
    RUN_OPTIONS,
    SEED_OPTION,
    SHAPE_OPTION,
    TP_OPTION,
    Option,
    parse_counts,
    read_count,
)
from saccade.errors import ConfigError, RequestError
from saccade.models.registry import fetch_place

NOT_ARGUMENTS = ("tp", "ep", "out")  # options that are read here

Records = list[dict[str, Any]]


class BenchCommand(NamedTuple):
    name: str
    module: str  # below saccade.bench
    help: str
    options: tuple[Option, ...]

    @property
    def has_ranks(self) -> bool:
        return TP_OPTION.name in (option.name for option in self.options)

    def fetch(self, verb: str) -> Any:
        """The function `bench_NAME` or `show_NAME`."""
        return fetch_place(f"saccade.bench.{self.module}:{verb}_{self.name}")

    def read(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the function, of the values of all options. RequestError for one that makes no sense."""
        arguments = {}
        for option in self.options:
            value = asked[option.name]
            if option.name in NOT_ARGUMENTS or value is None:
                continue
            read = option.read
            arguments[option.argument or option.name] = value if read is None else read(option.name, value)
        return arguments

    def name_option(self, text: str) -> str:
        """An error that begins with the name of an argument, with the option as it is typed instead."""
        name, colon, rest = text.partition(": ")
        for option in self.options:
            if colon and name in (option.name, option.argument, option.flag.removeprefix("--")):
                return f"{option.flag}: {rest}"
        return text


BENCH_COMMANDS = (
    BenchCommand(
        "allreduce",
        "ranks.allreduce",
        "What a sum over ranks takes, for messages of 14 KB to 128 MB: ours, NCCL, gloo.",
        (TP_OPTION._replace(default=2), REPEATS_OPTION, *RUN_OPTIONS),
    ),
    BenchCommand(
        "decode",
        "steps.decode",
        "Time per token of whole decode steps on synthetic weights, against the bytes that they must move.",
        (
            SHAPE_OPTION, LAYERS_OPTION, BATCH_OPTION, CONTEXT_OPTION, ARRANGEMENT_OPTION,
            Option("steps", "Steps of a sample.", 20),
            REPEATS_OPTION,
            Option("random_cache", "No prefill: caches of random rows.", False),
            Option("index_cache", "How index keys are cached: bf16 or fp8.", "bf16"),
            Option("latent_cache", "How latents are cached: bf16 or fp8.", "bf16"),
            EXPERTS_OPTION, RECORD_EXPERTS_OPTION,
            Option(
                "speculate", "Also steps with so many drafts; several with commas.", metavar="K", argument="drafts",
                read=parse_counts,
            ),
            Option("plot", "Draw one layer's kernels as SVG.", metavar="FILE"),
            TP_OPTION, EP_OPTION, SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
    BenchCommand(
        "prefill",
        "steps.prefill",
        "Time to the first token after a prompt, on synthetic weights.",
        (
            SHAPE_OPTION, LAYERS_OPTION, CONTEXT_OPTION, ARRANGEMENT_OPTION,
            CHUNK_OPTION._replace(help="Tokens of a step.", default=BATCH_TOKENS["cuda"]),
            ACTIVATIONS_OPTION,
            EXPERTS_OPTION, RECORD_EXPERTS_OPTION, REPEATS_OPTION._replace(default=5), TP_OPTION, EP_OPTION,
            SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
    BenchCommand(
        "engine",
        "steps.traffic",
        "Requests per second and time between tokens of an engine whose clients ask again and again.",
        (
            SHAPE_OPTION._replace(default="bundled"), LAYERS_OPTION, CLIENTS_OPTION, PROMPT_OPTION, OUTPUT_OPTION,
            CHUNK_OPTION,
            Option("capture", "Again with captured selections.", False),
            Option("arrivals", "again: who is answered asks; or poisson: by chance.", "again"),
            Option("load", "poisson: requests a second, of those that again gets.", 0.8),
            Option("ahead", 'Launch a step before the last one is read: "on", "off", or "auto": as LLM does.', "auto"),
            Option("temperature", "Of all requests; 0: the likeliest tokens.", 0.0),
            Option("top_p", "Of all requests.", 1.0),
            Option("mixed", "Capture steps with prompts up to so many tokens. Default: as LLM has it.", kind=int),
            ACTIVATIONS_OPTION, EXPERTS_OPTION, SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
    BenchCommand(
        "chunks",
        "steps.chunks",
        "The longest gap between tokens while a long prompt enters, and its time to the first token, by chunk.",
        (
            SHAPE_OPTION, LAYERS_OPTION, MIXED_CHUNKS_OPTION,
            Option("decodes", "Requests beside.", 8),
            Option("context", "Tokens of the prompt.", 8192),
            ACTIVATIONS_OPTION, EXPERTS_OPTION, REPEATS_OPTION._replace(default=3), SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
    BenchCommand(
        "host",
        "steps.host",
        "The host's share of a step: the engine before a model that computes nothing.",
        (
            CLIENTS_OPTION._replace(default="1,16,64,256"), PROMPT_OPTION, OUTPUT_OPTION,
            CHUNK_OPTION._replace(help="Tokens of a step. Default: as LLM has it on a GPU."), SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
    BenchCommand(
        "indexer",
        "projection.operation",
        "The indexer's projection in six arrangements, as single operations with cold weights.",
        (SHAPE_OPTION, BATCH_OPTION._replace(default="1,4,16"), REPEATS_OPTION, SEED_OPTION, *RUN_OPTIONS),
    ),
    BenchCommand(
        "start",
        "steps.start",
        "Seconds from the start of a process to its first token, with a cold and a warm kernel cache.",
        (
            SHAPE_OPTION, LAYERS_OPTION,
            Option("batch", "Requests of a step.", 1, read=read_count(1, MOST_REQUESTS)),
            Option("context", "Tokens of a request.", 128),
            Option("arrangement", "packed[-fp8], fused, two-streams, separate[-fp8] or reference."),
            Option(
                "compilers", "Processes that compile kernels beside. Default: as LLM has them on a GPU.", kind=int,
                read=read_count(0, THREAD_LIMIT),
            ),
            SEED_OPTION, *RUN_OPTIONS,
        ),
    ),
)  # fmt: skip


def find_command(name: str) -> BenchCommand:
    return next(command for command in BENCH_COMMANDS if command.name == name)


def measure_command(name: str, asked: Mapping[str, Any], say: Callable[[str], None]) -> Records:
    """The records of a command. `asked`: the value of each of its options."""
    from saccade.bench.ranks.join import join_bench_ranks

    command = find_command(name)
    arguments = command.read(asked)
    with join_bench_ranks(name, asked) as ranks:
        if command.has_ranks:
            arguments["ranks"] = ranks
        found: Records = command.fetch("bench")(say=say, **arguments)
        return found


def run_command(name: str, asked: Mapping[str, Any], as_json: bool, say: Callable[[str], None]) -> None:
    """Measure, print, and write the records if a file is named."""
    from saccade.bench.record import prepare_file, write_records

    command = find_command(name)
    try:
        prepare_file("out", asked["out"])
        records = measure_command(name, asked, say)
    except (RequestError, ConfigError) as error:
        raise type(error)(command.name_option(str(error))) from error
    show: Callable[[Sequence[dict[str, Any]]], str] = command.fetch("show")
    print(to_json(records) if as_json else show(records))
    if asked["out"]:
        write_records(asked["out"], records)
