"""A rank's share of parameters that one rank holds whole: cut by the boxes of the two plans, as loading would."""

from collections.abc import Mapping

from torch import Tensor

from saccade.kernels.types import SCALE_BLOCK
from saccade.models.parameters import Box, Span
from saccade.plan import Plan
from saccade.weights.weights import Weights


def share_weights(whole: Plan, held: Mapping[str, Tensor], mine: Plan) -> Weights:
    """`held` are the tensors of `whole`, a plan of one rank; numbers, or FP8 codes by 128 x 128."""
    parts = {param.name: {p.source: p for p in param.parts} for param in whole.params}
    made: dict[str, Tensor] = {}
    for param in mine.params:
        for leaf, unit in (("", 1), (".scale", SCALE_BLOCK)):
            name = param.name + leaf
            if name not in mine.stored:
                continue
            own = held[name].new_empty(mine.stored[name].shape)
            for part in param.parts:
                full = parts[param.name][part.source]
                lead = len(part.put) - len(part.take)  # an expert's place among the stacked ones
                take = [
                    (put[0] + a - begin[0], put[0] + b - begin[0])
                    for (a, b), begin, put in zip(part.take, full.take, full.put[lead:], strict=True)
                ]
                from_, to = (*full.put[:lead], *take), part.put
                own[cut(to, unit, lead)] = held[name][cut(from_, unit, lead)]
            made[name] = own
    return Weights(made, kept=mine.stored)


def cut(box: Box | tuple[Span, ...], unit: int, lead: int) -> tuple[slice, ...]:
    """Slices of a box; of scales, of the blocks that it covers, but for `lead` axes that are not divided."""
    spans = [(a, b) if i < lead else (a // unit, -(-b // unit)) for i, (a, b) in enumerate(box)]
    return tuple(slice(a, b) for a, b in spans)
