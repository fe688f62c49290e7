"""`python -m saccade.bench decode ...`: the benchmarks of a device, where typer is not installed.

The same options as `saccade bench`; the work is done by the same functions. Next: commands.py.
"""

import argparse
import sys
from collections.abc import Sequence

from saccade.api.settings import BATCH_TOKENS
from saccade.base.json_text import to_json
from saccade.bench.commands import measure_command
from saccade.bench.record import write_records
from saccade.errors import SaccadeError
from saccade.kernels.types import MIXED_TOKENS


def print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m saccade.bench", description="Measure the engine on a device.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, batch, context in (
        ("decode", "1", "8192"), ("prefill", None, "8192"), ("indexer", "1,4,16", None), ("start", "1", "128"),
        ("engine", None, None), ("host", None, None), ("chunks", None, None), ("allreduce", None, None),
    ):  # fmt: skip
        command = commands.add_parser(name)
        if name not in ("allreduce", "host"):
            command.add_argument("--shape", default="bundled" if name == "engine" else "v32-rank-of-8")
        command.add_argument("--device", default="auto")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--commit", help="of the sources, where there is no git")
        command.add_argument("--json", action="store_true", help="print the records instead of the table")
        command.add_argument("--out", metavar="FILE", help="write the records there too")
        if batch:
            command.add_argument("--batch", default=batch, help="several with commas")
        if context:
            command.add_argument("--context", default=context, help="several with commas")
        if name in ("decode", "prefill", "allreduce"):
            command.add_argument("--tp", type=int, default=1 + (name == "allreduce"), help="ranks, a GPU each")
            command.add_argument("--ep", type=int, default=1, help="of them divide the experts")
        if name not in ("indexer", "allreduce", "host"):
            command.add_argument("--layers", type=int, help="the first N layers only")
        if name not in ("indexer", "engine", "host", "chunks", "allreduce"):
            command.add_argument("--arrangement", help="several with commas")
        if name in ("decode", "prefill", "indexer", "allreduce"):
            command.add_argument("--repeats", type=int, default=7)
        if name == "decode":
            command.add_argument("--steps", type=int, default=20, help="of a sample")
            command.add_argument("--random-cache", action="store_true", help="no prefill: random rows")
            command.add_argument("--index-cache", help="bf16 or fp8")
            command.add_argument("--experts", default="router", help="router, or uniform: any as likely as any other")
            command.add_argument("--speculate", metavar="K", help="also steps with so many drafts; several with commas")
            command.add_argument("--plot", metavar="FILE", help="draw one layer as SVG")
        if name in ("engine", "host"):
            clients = "1,8,32,128" if name == "engine" else "1,16,64,256"
            command.add_argument("--clients", default=clients, help="requests in flight; several with commas")
            command.add_argument("--prompt", type=int, default=64, help="tokens of a request")
            command.add_argument("--output", type=int, default=256, help="tokens that follow")
            command.add_argument("--chunk", type=int, help="tokens of a step")
        if name == "start":
            command.add_argument("--compilers", type=int, default=0, help="processes that compile kernels beside")
        if name == "engine":
            command.add_argument("--arrivals", default="again", help="again: who is answered asks; or poisson")
            command.add_argument("--load", type=float, default=0.8, help="poisson: of the requests that again gets")
            command.add_argument("--ahead", action="store_true", help="launch a step before the last one is read")
            command.add_argument(
                "--mixed", type=int, default=MIXED_TOKENS, help="capture steps with prompts up to this"
            )
        if name == "chunks":
            command.add_argument("--chunk", default="64,256,1024,4096", help="tokens of a step; several with commas")
            command.add_argument("--decodes", type=int, default=8, help="requests beside")
            command.add_argument("--context", type=int, default=8192, help="tokens of the prompt")
            command.add_argument("--repeats", type=int, default=3)
        if name == "prefill":
            command.add_argument("--chunk", type=int, default=BATCH_TOKENS["cuda"], help="tokens of a step")
            command.add_argument("--activations", default="exact", help="inputs of products: exact, bf16 or fp8")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    a = parse(arguments)
    try:
        records, show = measure_command(a, print_line)
        if a.out:
            write_records(a.out, records)
    except (SaccadeError, OSError) as error:
        print_line(f"saccade: {error}")
        return 2
    print(to_json(records) if a.json else show(records))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
