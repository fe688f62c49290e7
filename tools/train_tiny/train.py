"""Train the bundled model, in pieces that can be resumed.

    python -m tools.train_tiny.train --state DIR --out DIR [--seconds N] [--device cuda] [--workers N]

`--state` keeps everything a later call needs to go on as if it had not been interrupted; `--out` receives the log, the
plot, the scores and, in pieces of less than 16 MB, the fp32 weights that export.py turns into the checkpoint. The
order of things is DeepSeek-V3.2's: dense attention while the indexer learns to imitate it, then attention over its
selection only; FP8 rounding at the end. Next: losses.py, model.py.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.models.dsa.config import ModelConfig
from tools.train_tiny import config
from tools.train_tiny.data import Rows, Shape, make_batch
from tools.train_tiny.evaluate import Score, evaluate
from tools.train_tiny.faults import compare
from tools.train_tiny.losses import Group, Mode, balance, find_losses
from tools.train_tiny.optimizer import Optimizer
from tools.train_tiny.plot import draw_plot
from tools.train_tiny.replay import Replay
from tools.train_tiny.weights import draw_weights, is_writer, prepare

SEED = 20251124
WARMUP = 60  # steps
BALANCE = 0.05  # the router's bias moves by so much times the learning rate
LOG_EVERY = 20
PIECE = 14 << 20  # bytes


@dataclass(frozen=True)
class Phase:
    """So many steps of one kind. The learning rate goes from `rate` to `last_rate` along a line."""

    name: str
    steps: int
    shapes: tuple[Shape, ...]  # in turn
    sparse: bool
    all: bool = True  # train the MTP layer and the indexers too
    fp8: bool = False
    recycled: float = 0.0
    rate: float = 0.01
    last_rate: float = 0.01


WORDS = Shape(short=256)
SUMS = Shape(short=256, sums=0.3)
L128, L256, L1024, L4096 = (Shape(long=36864 // n, length=n) for n in (128, 256, 1024, 4096))
MIXED = (L4096, WORDS, L1024, WORDS, L256, WORDS)
PHASES = (
    Phase("look up", 300, (L128, SUMS), sparse=False, all=False),
    Phase("dense 256", 1000, (L256, L256, WORDS), sparse=False, all=False),
    Phase("dense 1024", 900, (L1024, L256, L1024, WORDS), sparse=False, all=False),
    Phase("dense 4096", 600, (L4096, L1024, L4096, WORDS), sparse=False, all=False),
    Phase("warm-up", 600, MIXED, sparse=False),
    Phase("sparse", 1800, MIXED, sparse=True, last_rate=0.006),
    Phase("sparse FP8", 2400, MIXED, sparse=True, fp8=True, recycled=0.1, rate=0.006, last_rate=0.0),
)


def rehearse(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The same in small, to see that all of it runs before a GPU is asked for."""
    return tuple(
        replace(
            p,
            steps=10,
            shapes=tuple(Shape(min(s.short, 4), min(s.long, 2), min(s.length, 256), s.sums) for s in p.shapes),
        )
        for p in phases
    )


def find_phase(phases: tuple[Phase, ...], step: int) -> tuple[Phase, int]:
    """The phase of a step, and how many of its steps come before."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError("behind the last phase")


class Batches(Dataset[list[Rows]]):
    def __init__(self, phases: tuple[Phase, ...], seed: int):
        self.phases, self.seed = phases, seed

    def __getitem__(self, step: int) -> list[Rows]:
        phase, place = find_phase(self.phases, step)
        return make_batch(self.seed, step, phase.shapes[place % len(phase.shapes)])

    def __len__(self) -> int:
        return sum(phase.steps for phase in self.phases)


Kind = tuple[Mode, bool, tuple[tuple[int, ...], ...]]  # of a step: mode, FP8, shapes of its groups


class Trainer:
    """Weights, optimizer and step; `run` goes on from wherever they are."""

    def __init__(self, c: ModelConfig, phases: tuple[Phase, ...], device: str, seed: int = SEED):
        self.c, self.phases, self.device, self.seed = c, phases, device, seed
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.weights = {name: w.to(device) for name, w in draw_weights(c, seed).items()}
        self.optimizer = Optimizer(self.weights)
        self.replay = Replay(device, self.compute)
        self.step = 0
        self.log: list[dict[str, float | str]] = []
        self.latest: dict[str, dict[str, Tensor]] = {}  # name of rows -> the losses when they came last

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights, "optimizer": self.optimizer.state}
        torch.save(state | {"step": self.step, "log": self.log}, folder / "state.part")
        os.replace(folder / "state.part", folder / "state.pt")

    def restore(self, folder: Path) -> None:
        """Go on from a saved state, if there is one."""
        if not (folder / "state.pt").exists():
            return
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        for name, w in state["weights"].items():
            self.weights[name].copy_(w)
        for name, t in state["optimizer"].items():
            self.optimizer.state[name].copy_(t)
        self.step, self.log = state["step"], state["log"]

    def run(self, seconds: float = float("inf"), workers: int = 0) -> None:
        """Until the phases or the seconds are over."""
        batches = Batches(self.phases, self.seed)
        order = range(self.step, len(batches))
        loader = DataLoader(
            batches, batch_size=None, sampler=order, num_workers=workers, collate_fn=keep,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        begin = last = time.monotonic()
        tokens = 0
        for batch in loader:
            self.train(batch)
            tokens += sum(rows.tokens.size for rows in batch)
            if self.step % LOG_EVERY == 0 or self.step == len(batches):
                now = time.monotonic()
                self.note(tokens / (now - last))
                last, tokens = now, 0
            if time.monotonic() - begin > seconds:
                break

    def train(self, batch: list[Rows]) -> None:
        phase, place = find_phase(self.phases, self.step)
        rate = phase.rate + (phase.last_rate - phase.rate) * place / phase.steps
        rate *= min(1.0, (self.step + 1) / WARMUP)
        dice = torch.Generator().manual_seed(self.seed + self.step)
        inputs = [torch.tensor([*self.optimizer.find_factors(rate, self.step), rate * BALANCE])]
        for rows in batch:
            inputs += [torch.from_numpy(rows.tokens), torch.from_numpy(rows.kinds)]
            inputs.append(torch.rand(2, *rows.tokens.shape, generator=dice))
        names = tuple(rows.name for rows in batch)
        shapes = tuple(rows.tokens.shape for rows in batch)
        parts = self.replay((Mode(phase.sparse, phase.all, phase.recycled), phase.fp8, shapes), inputs)
        self.latest |= {name: {k: v.clone() for k, v in part.items()} for name, part in zip(names, parts, strict=True)}
        self.step += 1

    def compute(self, kind: Kind, inputs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """One step, from tensors on the device: losses, gradients, new weights in place. Waits for nothing, so that a
        CUDA graph can hold it."""
        mode, fp8, _ = kind
        factors, groups = inputs[0], list(zip(inputs[1::3], inputs[2::3], inputs[3::3], strict=True))
        with torch.no_grad():
            ready = prepare(self.weights, self.dtype, fp8)
        leaves = {name: w.detach().requires_grad_() for name, w in ready.items()}
        loads: dict[int, Tensor] = {}
        parts = []
        for tokens, kinds, chance in groups:
            losses = find_losses(leaves, self.c, Group(tokens.long(), kinds.long(), chance), mode)
            losses.total.backward()
            parts.append(losses.parts)
            for layer, load in losses.loads.items():
                loads[layer] = loads.get(layer, 0) + load
        gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()}
        for name, gradient in gradients.items():
            if is_writer(name):
                gradient[..., config.TOKEN_ONLY :, :] = 0  # the rows are 0 from the start
        self.optimizer.step(gradients, factors[:3])
        balance(self.weights, loads, factors[3])
        return parts

    def note(self, speed: float) -> None:
        """One line of the log: the losses of each kind of rows when it came last."""
        phase, _ = find_phase(self.phases, self.step - 1)
        row: dict[str, float | str] = {"step": self.step, "phase": phase.name, "tokens_per_s": round(speed)}
        line = f"{self.step:5} {phase.name:10} {speed / 1e3:4.0f}k/s"
        for name, parts in self.latest.items():
            values = {
                part: round(value, 4)
                for part, value in zip(parts, torch.stack(list(parts.values())).tolist(), strict=True)
            }
            row |= {f"{name}.{part}": value for part, value in values.items()}
            line += f" | {name} " + " ".join(
                f"{v:.3f}" for part, v in values.items() if not part.startswith(("kl", "mass"))
            )
            if name != "words":
                line += "".join(f" {v:.2f}" for part, v in values.items() if part.startswith(("kl", "mass")) and v)
        self.latest.clear()
        self.log.append(row)
        print(line, flush=True)

    def evaluate(self, lengths: tuple[int, ...], problems: int, fp8: bool = True) -> Iterator[Score]:
        phase, _ = find_phase(self.phases, max(self.step - 1, 0))
        return evaluate(prepare(self.weights, self.dtype, fp8), self.c, lengths, problems, phase.sparse, self.device)


def keep(rows: list[Rows]) -> list[Rows]:
    return rows


def save_pieces(weights: dict[str, Tensor], folder: Path) -> None:
    """The weights in as many files as it takes to stay below PIECE bytes each."""
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, w in weights.items():
        size += w.nbytes
        if size > PIECE:
            pieces.append({})
            size = w.nbytes
        pieces[-1][name] = w.detach().cpu().contiguous()
    for i, piece in enumerate(pieces):
        save_file(piece, folder / f"weights-{i}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--rehearse", action="store_true", help="ten steps of each phase, on small batches")
    parser.add_argument("--problems", type=int, default=256, help="of each kind, in the evaluation at the end")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config.load_config(), rehearse(PHASES) if options.rehearse else PHASES, options.device)
    trainer.restore(options.state)
    trainer.run(options.seconds, options.workers)
    trainer.save(options.state)
    (options.out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.log))
    save_pieces(trainer.weights, options.out)
    draw_plot(trainer.log, options.out / "losses.png")
    if trainer.step < sum(phase.steps for phase in trainer.phases):
        return print(f"step {trainer.step}: not finished; call again with the same --state")
    scores = []
    lengths = (256,) if options.rehearse else (256, 1024, 4096)
    for score in trainer.evaluate(lengths, options.problems):
        scores.append(score._asdict())
        print(score, flush=True)
    (options.out / "scores.json").write_text(json.dumps({"step": trainer.step, "scores": scores}, indent=2) + "\n")
    ready = prepare(trainer.weights, trainer.dtype, fp8=True)
    for fault, found in compare(ready, trainer.c, lengths[len(lengths) // 2], options.problems // 4, options.device):
        print(f"{fault:30}", *(f"{s.task} {s.exact:.2f}/{s.accepted:.2f}" for s in found), flush=True)


if __name__ == "__main__":
    main()
