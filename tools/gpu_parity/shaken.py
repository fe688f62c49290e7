"""The reference against itself, each input of a layer moved to its neighbour: `python -m tools.gpu_parity.shaken`.

What it does not decide no kernel can repeat: a cached row halfway between two BF16 numbers, two experts that tie.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.api.llm import LLM
from saccade.kernels import ACTIVATION_NAMES
from saccade.kernels.types import Selection
from saccade.models.dsa.transformer import Steer
from saccade.models.glm5_next.operations import Streams
from saccade.ops.device import on
from saccade.ops.interface import Residual
from saccade.ops.step import Step
from tools.gpu_parity.compare import BARS
from tools.gpu_parity.measure import draw_prompts
from tools.gpu_parity.runs import Collector, attends, begin_anew, find_logits, lay_out, plan_steps, read_input, score


def shake_inputs(random: torch.Generator, given: Sequence[Tensor]) -> Steer:
    """Each layer's input is moved to the next number up or down, by chance, and the layer selects what it is given."""
    layers = dict[int, Tensor]()  # what those that attend are given

    def steer(i: int, x: Residual, own: Selection | None, step: Step) -> tuple[Residual, Selection | None]:
        numbers = read_input(x)
        way = torch.randint(0, 2, numbers.shape, generator=random, device=numbers.device) - 0.5
        moved = torch.nextafter(numbers, way * torch.inf)
        x = replace(x, value=x.value._replace(values=moved) if isinstance(x.value, Streams) else moved)
        if not attends(step.cache, i):
            return x, own
        selection = layers.setdefault(i, given[min(len(layers), len(given) - 1)])
        return x, selection[step.batch.positions]

    return steer


@torch.inference_mode()
def run(llm: LLM, text: Sequence[int], steer: Steer | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities f32 [n - 1] of each token given those before it, and selections i32 [layers, n, K]."""
    logits, chosen = Collector(1), Collector(1)
    begin_anew(llm, [text])
    with on(llm.settings.device):
        for step in plan_steps([text], [len(text) - 1], llm.settings.max_batch_tokens):
            batch = lay_out(llm, [text], step)
            seen: list[Selection] = []
            hidden = llm.model.forward(batch, llm.engine.cache, seen, steer)
            logits.add(step, find_logits(llm, hidden, batch))
            chosen.add(step, torch.stack(seen))
    return score(logits.join()[0], text), chosen.join()[0]


def shake(llm: LLM, text: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """f32 [len(seeds), n - 1]: how far log-probabilities move, with the selections of the model at rest."""
    expected, given = run(llm, text)
    moved = []
    for seed in seeds:
        random = torch.Generator(llm.settings.device).manual_seed(seed)
        moved.append((run(llm, text, shake_inputs(random, given))[0] - expected).abs())
    return torch.stack(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description="How far the reference moves when its layers' inputs are shaken.")
    parser.add_argument("--model", default=None, help="a checkpoint; default: the bundled one")
    parser.add_argument("--prompts", type=int, default=50, help="the same as those of tools.gpu_parity")
    parser.add_argument("--longest", type=int, default=4030, help="tokens of a prompt")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32"), help="of weights and cache")
    parser.add_argument(
        "--activations", default="exact", choices=ACTIVATION_NAMES, help="what products see of their inputs"
    )
    parser.add_argument("--latent-cache", default="bf16", choices=("bf16", "fp8"), help="how latents are cached")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    rounding = {"activations": asked.activations, "latent_cache": asked.latent_cache}
    llm = LLM(asked.model, asked.device, dtype=asked.dtype, kernels="reference", **rounding)
    prompts = draw_prompts(llm, asked.prompts, asked.longest)
    if rounding != {
        "activations": "exact",
        "latent_cache": "bf16",
    }:  # not shaken: what the rounding itself does, selections included
        exact = LLM(asked.model, asked.device, dtype=asked.dtype, kernels="reference")
        off = torch.cat([(run(llm, prompt)[0] - run(exact, prompt)[0]).abs() for prompt in prompts])
        print(f"from exact: {len(off)} tokens, largest {off.max():.1e}, mean {off.mean():.1e}")
    all_moved = [shake(llm, prompt, range(asked.times)) for prompt in prompts]
    for time, moved in enumerate(zip(*all_moved, strict=True)):
        tokens, over = torch.cat(moved), [(~(m <= BARS["log_prob"])).nonzero()[:, 0].tolist() for m in moved]
        named = ", ".join(f"prompt {i} token {place}" for i, places in enumerate(over) for place in places)
        line = f"{asked.dtype}, activations {asked.activations}, time {time}: {len(tokens)} tokens, largest"
        print(f"{line} {tokens.max():.1e}, mean {tokens.mean():.1e}; above {BARS['log_prob']:g}: {named or 'none'}")


if __name__ == "__main__":
    main()
