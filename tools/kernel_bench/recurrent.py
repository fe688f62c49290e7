"""Kimi delta attention at the shapes of GLM-5.3-Flash: python -m tools.kernel_bench.recurrent [--heads 64,16,8]

Decode of 1, 8 and 64 requests in every division of the work, and a prompt of 8,192 tokens: us a layer, in a CUDA graph
over states that L2 does not hold, beside the time in which a GPU of 4.8 TB/s could move the bytes that must move. First
of all the gates alone. Results are compared with fp64's. 64 heads are a whole layer, 16 and 8 a rank's of 4 and of 8.
Next: kernels/recurrent/tokens.py, which has the divisions.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.recurrent import tokens as few
from saccade.kernels.recurrent.chunks import ChunksConfig, run_chunks
from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights, find_decay, run_delta
from saccade.kernels.recurrent.gates import Gates, find_gates
from saccade.kernels.recurrent.recur import run_recurrence
from saccade.kernels.types import Matrix, Norm
from tools.kernel_bench.trials import compile_all, error, report, time_graph

DIM, WIDTH, RING = 128, 4, 9
COLD = 200 << 20  # bytes of all states together: L2 holds 50 MB
RATE = 4.8e6  # bytes a us
DIVISIONS = [few.TokensConfig(columns, warps) for columns in (16, 32, 64) for warps in (2, 4, 8)]


class Rank:
    """One layer of a rank that has so many heads."""

    def __init__(self, heads: int, requests: int, tokens: int, start: int) -> None:
        """Each request continues at `start` by so many tokens; what came before is random."""
        device, n = torch.device("cuda"), heads * DIM
        self.tokens, self.heads = requests * tokens, heads
        conv, decay = torch.randn(3 * n, WIDTH, device=device) / 2, torch.randn(heads, device=device) / 2
        self.delta = DeltaWeights(conv, decay, torch.randn(n, device=device), -5.0, heads, DIM)
        self.low = [Matrix((torch.randn(n, DIM, device=device) * DIM**-0.5).bfloat16()) for _ in range(2)]
        self.norm = Norm(torch.rand(DIM, device=device) + 0.5, 1e-5)
        widths = [3 * n, heads, DIM, DIM]
        self.inputs = torch.randn(self.tokens, sum(widths), device=device).split(widths, dim=1)
        starts = torch.arange(requests + 1, device=device) * tokens
        size = requests * heads * DIM * DIM * 4
        self.states = [self.make_state(requests + 1, start) for _ in range(max(2, min(64, COLD // size)))]
        line = start + torch.arange(tokens, device=device).repeat(requests)
        self.positions = line.repeat(len(self.states), 1)
        places = torch.arange(1, requests + 1, device=device)
        self.where = [few.Where(places, positions, starts) for positions in self.positions]  # of each state

    def make_state(self, places: int, start: int) -> DeltaState:
        """One token is pending, as in every decode but the first."""
        n, device = self.heads * DIM, torch.device("cuda")
        recent = torch.randn(places, RING, 4 * n + self.heads, device=device)
        recent[..., 3 * n :].sigmoid_()
        recent[..., 3 * n : 4 * n].mul_(-5)
        matrix = torch.randn(places, self.heads, DIM, DIM, device=device)
        return DeltaState(matrix, torch.full((places, self.heads), max(0.0, start - 1), device=device), recent)

    def find_gates(self, counters: int) -> Gates:
        _, beta, forget, gate = self.inputs
        return find_gates(forget, gate, beta, self.low[0], self.low[1], self.delta, self.where[0].query_start, counters)

    def count_bytes(self) -> int:
        """That must be read or written once: matrices, the ring, inputs, results."""
        n, requests = self.heads * DIM, len(self.where[0].places)
        ring = 4 * (3 * n * 4 + n) + 4 * 4 * n  # four tokens before, of one of them the decay; one is written
        return requests * (2 * n * DIM * 4 + ring) + self.tokens * n * (3 + 1 + 1 + 1) * 4

    def run(self, i: int) -> Tensor:
        args = *self.inputs, self.low[0], self.low[1], self.delta, self.norm, self.states[i], self.where[i]
        return run_recurrence(*args, multiply=reference.linear)

    def find_right(self, places: int) -> Tensor:
        """Of the first requests, in fp64."""
        d = DeltaWeights(*(x.double() for x in self.delta[:3]), *self.delta[3:])
        qkv, beta, forget, gate = (x.double() for x in self.inputs)
        low = [w.data.double().T for w in self.low]
        rows = torch.cat([qkv, find_decay(forget @ low[0], d).flatten(1), beta.sigmoid()], dim=1)
        state, ends = DeltaState(*(x.double() for x in self.states[0])), self.where[0].query_start.tolist()
        spans = list(zip(ends, ends[1:], strict=False))[:places]
        seen = [run_delta(rows[a:b], d, state, i + 1, int(self.positions[0, a])) for i, (a, b) in enumerate(spans)]
        seen = reference.rms_norm(torch.cat(seen), self.norm.weight.double(), self.norm.eps)
        return (seen * (gate[: len(seen)] @ low[1]).sigmoid().view_as(seen)).flatten(1)

    def check(self) -> str:
        """Of the first two requests."""
        right = self.find_right(2)
        return f"{error(self.run(0)[: len(right)], right):.0e} off"


def measure(name: str, rank: Rank, run: Callable[[int], Tensor], step: int) -> None:
    """Once for each state, each `step` positions behind the time before."""
    nbytes, last = rank.count_bytes(), len(rank.states) - 1

    def call(i: int) -> Tensor:
        found = run(i)
        if step and i == last:
            rank.positions.add_(step)
        return found

    def tell() -> str:
        us = time_graph([lambda i=i: call(i) for i in range(last + 1)])  # type: ignore[misc]
        return f"{us:8.2f} us {nbytes / us / 1e6:5.2f} TB/s of {nbytes / 1e6:.1f} MB, limit {nbytes / RATE:.2f} us"

    report(name, tell)


def compare_decode(heads: int, requests: int) -> None:
    rank, label = Rank(heads, requests, 1, 100), f"{heads} heads, {requests} requests"
    compile_all([lambda: rank.run(1)])
    report(f"{label}: error", rank.check)
    rank = Rank(heads, requests, 1, 100)
    counters = requests * heads
    measure(f"{label}: gates", rank, lambda i: rank.find_gates(counters).out, 0)
    measure(f"{label}: gates and tokens", rank, rank.run, 1)
    for how in DIVISIONS:

        def run(i: int, how: few.TokensConfig = how) -> Tensor:
            gates = rank.find_gates(counters)  # which clears the counters
            few.run_tokens(rank.inputs[0], gates, rank.delta, rank.norm, rank.states[i], rank.where[i], config=how)
            return gates.out

        measure(f"{label}: {how.columns} columns, {how.warps} warps", rank, run, 1)


def compare_prompt(heads: int, tokens: int = 8192) -> None:
    report(f"{heads} heads, 512 tokens: error", Rank(heads, 1, 512, 0).check)
    rank = Rank(heads, 1, tokens, 0)
    measure(f"{heads} heads, {tokens} tokens: all", rank, rank.run, 0)
    gates = rank.find_gates(0)
    for how in [ChunksConfig(), ChunksConfig(16), ChunksConfig(64, 8)]:

        def run(i: int, how: ChunksConfig = how) -> Tensor:
            run_chunks(rank.inputs[0], gates, rank.delta, rank.norm, rank.states[i], rank.where[i], how)
            return gates.out

        measure(f"{heads} heads, {tokens} tokens: chunks, {how.columns} columns, {how.warps} warps", rank, run, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="64,16,8")
    print(torch.cuda.get_device_name())
    torch.manual_seed(0)
    for heads in map(int, parser.parse_args().heads.split(",")):
        for requests in (1, 8, 64):
            compare_decode(heads, requests)
        compare_prompt(heads)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
