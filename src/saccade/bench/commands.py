"""From options to records: what `saccade bench` and `python -m saccade.bench` share.

Knows neither typer nor argparse's parsers. Next: steps/decode.py, steps/prefill.py, steps/start.py,
steps/traffic.py, projection/operation.py.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

from saccade.bench.projection.operation import bench_indexer, show_indexer
from saccade.bench.ranks.allreduce import bench_allreduce, show_allreduce
from saccade.bench.ranks.join import join_bench_ranks
from saccade.bench.record import Record, parse_counts
from saccade.bench.steps.chunks import bench_chunks, show_chunks
from saccade.bench.steps.decode import bench_decode, show_decode
from saccade.bench.steps.host import bench_host, show_host
from saccade.bench.steps.prefill import bench_prefill, show_prefill
from saccade.bench.steps.start import bench_start, show_start
from saccade.bench.steps.traffic import bench_engine, show_engine
from saccade.errors import RequestError
from saccade.parallel.ranks import Ranks

Show = Callable[[Sequence[Record]], str]


def measure_command(a: Namespace, say: Callable[[str], None]) -> tuple[list[Record], Show]:
    """The records of a command, and how they are shown."""
    with join_bench_ranks(a) as ranks:
        return measure_on(ranks, a, say)


def measure_on(ranks: Ranks, a: Namespace, say: Callable[[str], None]) -> tuple[list[Record], Show]:
    if a.command == "allreduce":
        found = bench_allreduce(ranks, a.device, a.repeats, a.commit, say)
        return found, show_allreduce
    if a.command == "host":
        clients = parse_counts("clients", a.clients)
        found = bench_host(clients, a.prompt, a.output, a.chunk, a.device, a.seed, a.commit, say)
        return found, show_host
    common = {"shape": a.shape, "device": a.device, "seed": a.seed, "commit": a.commit, "say": say}
    if a.command == "indexer":
        return bench_indexer(batches=parse_counts("batch", a.batch), repeats=a.repeats, **common), show_indexer
    if a.command == "engine":
        clients = parse_counts("clients", a.clients)
        found = bench_engine(
            clients=clients,
            layers=a.layers,
            prompt=a.prompt,
            output=a.output,
            chunk=a.chunk,
            capture=a.capture,
            arrivals=a.arrivals,
            load=a.load,
            ahead=a.ahead,
            mixed=a.mixed,
            **common,
        )
        return found, show_engine
    if a.command == "chunks":
        found = bench_chunks(
            chunks=parse_counts("chunk", a.chunk), layers=a.layers, decodes=a.decodes, context=a.context,
            repeats=a.repeats, **common,
        )  # fmt: skip
        return found, show_chunks
    names, contexts = split_names(a.arrangement), parse_counts("context", a.context)
    common["layers"] = a.layers
    if a.command == "prefill":
        found = bench_prefill(
            contexts=contexts, arrangements=names, chunk=a.chunk, repeats=a.repeats, ranks=ranks,
            activations=a.activations, **common,
        )  # fmt: skip
        return found, show_prefill
    batches = parse_counts("batch", a.batch)
    if a.command == "start":
        if max(len(names), len(contexts), len(batches)) > 1:
            raise RequestError("start takes one arrangement, one context and one batch")
        name = names[0] if names else None
        one = {"context": contexts[0], "batch": batches[0], "arrangement": name, "compilers": a.compilers}
        return bench_start(**one, **common), show_start
    found = bench_decode(
        batches=batches, contexts=contexts, arrangements=names, steps=a.steps, repeats=a.repeats, plot=a.plot,
        is_real=not a.random_cache, index_cache=a.index_cache, experts=a.experts,
        drafts=parse_counts("speculate", a.speculate) if a.speculate else (), ranks=ranks, **common,
    )  # fmt: skip
    return found, show_decode


def split_names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []
