"""The losses of one step: language model, MTP layer, indexers; and what the log shows of them.

The rows of a step come in groups of equal length; each group counts the same, whatever its number of tokens. No loss is
there to make faults visible: a model that was taught to fail when its indexer is broken would prove nothing by it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.dsa.config import ModelConfig
from tools.train_tiny.examples import ANSWER, FREE
from tools.train_tiny.model import Sampled, Weights, head, run_main, run_mtp

WEIGHTS = (0.0, 0.06, 0.1, 1.0)  # of FREE, TEXT, QUESTION and ANSWER tokens in the language model's loss
MTP_WEIGHT = 0.3  # of the MTP layer's loss: it reaches the embedding and the head, the main layers it does not


class Group(NamedTuple):
    tokens: Tensor  # i64 [B, L]
    kinds: Tensor  # i64 [B, L]
    chance: Tensor  # f32 [2, B, L] in [0, 1): for the rows to sample, and for the places to recycle


class Mode(NamedTuple):
    sparse: bool  # whether attention sees the indexer's selection only
    all: bool = True  # train the MTP layer and the indexers too
    recycled: float = 0.0  # share of places where the MTP layer gets its own last state, as in its second draft step


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]  # for the log, detached
    loads: dict[int, Tensor]  # layer -> [experts] tokens that chose each


def find_losses(w: Weights, c: ModelConfig, group: Group, mode: Mode) -> Losses:
    tokens, kinds, (for_rows, for_recycling) = group
    sampled = sample_rows(kinds, min(128, tokens.shape[1] // 4), for_rows) if mode.all else None
    hidden, reports = run_main(w, c, tokens, mode.sparse, sampled)
    lm, hit = weigh(head(w, hidden[:, :-1]), tokens[:, 1:], kinds[:, 1:])
    parts = {"lm": lm.detach(), "hit": hit}
    loads = {layer: r.load for layer, r in enumerate(reports) if r.load is not None}
    if not mode.all:
        return Losses(lm, parts, loads)

    next_tokens = F.pad(tokens[:, 1:], (0, 1))
    state = hidden.detach()  # so that what the second token needs is found by the MTP layer's own attention
    if mode.recycled:
        state = recycle(w, c, next_tokens, state, mode, for_recycling)
    drafts, report = run_mtp(w, c, next_tokens, state, mode.sparse, sampled)
    mtp, mtp_hit = weigh(head(w, drafts[:, :-2]), tokens[:, 2:], kinds[:, 2:])

    reports = [*reports, report]
    if report.load is not None:
        loads[len(reports) - 1] = report.load
    total = lm + MTP_WEIGHT * mtp + torch.stack([r.kl for r in reports]).sum()
    parts |= {"mtp": mtp.detach(), "mtp_hit": mtp_hit}
    for layer, r in enumerate(reports):
        parts |= {f"kl.{layer}": r.kl.detach(), f"mass.{layer}": r.mass.detach()}
    return Losses(total, parts, loads)


def weigh(logits: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean loss, and the share of answer tokens that are the best choice."""
    weight = sum((kinds == kind) * w for kind, w in enumerate(WEIGHTS) if w)
    assert isinstance(weight, Tensor)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    with torch.no_grad():
        is_answer = kinds == ANSWER
        hit = ((logits.argmax(-1) == targets) & is_answer).sum() / is_answer.sum().clamp(min=1)
    return (loss * weight.flatten()).sum() / weight.sum().clamp(min=1), hit


def sample_rows(kinds: Tensor, count: int, chance: Tensor) -> Sampled:
    """`count` query rows of each sequence, answers likelier than the rest, padding never (if it can be helped)."""
    chance = torch.where(kinds == ANSWER, chance**0.5, chance) - 2.0 * (kinds == FREE)
    rows = chance.topk(count, dim=1).indices
    weight = (kinds.gather(1, rows) != FREE).float()
    return Sampled(rows, weight / weight.sum().clamp(min=1))


@torch.no_grad()
def recycle(w: Weights, c: ModelConfig, next_tokens: Tensor, hidden: Tensor, mode: Mode, chance: Tensor) -> Tensor:
    """Hidden states, at some places replaced by the MTP layer's state for the place before, which stands for the same
    token when a draft is continued."""
    drafts, _ = run_mtp(w, c, next_tokens, hidden, mode.sparse)
    own = F.pad(drafts[:, :-1], (0, 0, 1, 0))
    replaced = chance < mode.recycled
    replaced[:, 0] = False
    return torch.where(replaced[..., None], own, hidden)


def balance(w: dict[str, Tensor], loads: dict[int, Tensor], rate: Tensor) -> None:
    """Make experts that got too few tokens likelier (loss-free balancing, DeepSeek-V3 report, section 2.1.2)."""
    for layer, load in loads.items():
        bias = w[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        bias += rate * (load.float().mean() - load).sign()
