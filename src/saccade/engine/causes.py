"""Why a request's numbers are not finite: the parameter that holds NaN or infinity, or the first layer that makes one.

Nobody comes here before a request has failed, so time matters little: a pass over the parameters, and, if all of them
are finite, one over the request's tokens, layer by layer. Memory does: parts of a parameter are looked at one by one,
and the pass writes into pages that are free. A step only notes what failed, so that the others in it are not held up.
Next: engine.py, whose step found out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.engine.buffers import Buffers, Run
from saccade.engine.model import Model
from saccade.engine.pages import clear_states
from saccade.engine.request import Job
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.page_pool import count_pages
from saccade.errors import NoAnswerError
from saccade.kernels.codes import read_scale
from saccade.ops.device import on
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.ops.step import Batch, Cache

JUDGED_AT_ONCE = 1 << 22  # numbers of a parameter that are judged at once: as f32, 16 MiB
MOST_PASSES = 8  # over tokens, until weights change: where a thousand requests fail, more would say the same


class RequestTokens(NamedTuple):
    """Tokens of the request, laid out for the model."""

    batch: Batch
    tokens: int  # those behind them in the batch are padding


class Causes:
    """Looks into one model. `forget` when its weights have changed."""

    def __init__(self, model: Model, held: Mapping[str, Tensor], ops: Any = None):
        """`held`: the model's parameters by name, in the order of the forward pass. `ops`: its operations in plain
        torch; None: the Reference's."""
        mtp = f"model.layers.{model.config.num_hidden_layers}."  # whose drafts are guesses, and no answers
        self._model, self._ops = model, ops or Reference()
        self._held = {name: tensor for name, tensor in held.items() if not name.startswith(mtp)}
        self.forget()

    def forget(self) -> None:
        self._parameter: str | None = None
        self._is_scanned, self._passes = False, 0

    def find_parameter(self) -> str | None:
        """The first parameter that is not finite, as a clause for an error; found once. All ranks give the same answer,
        though each holds a share: what follows is theirs to do together."""
        if not self._is_scanned:
            own, ranks = find_parameter(self._held) or "", self._ops.ranks
            if own and ranks.layout.tp > 1:
                own += f" on rank {ranks.layout.rank}"
            self._parameter = next((found for found in ranks.collect(own) if found), None)
            self._is_scanned = True
        return self._parameter

    def find_layer(self, parts: Iterable[RequestTokens], cache: Cache) -> str | None:
        """The first layer that gives what is not finite, run over the request's tokens from position 0 on, as a clause;
        None if there is none. Writes the cache rows of `parts`."""
        if self._passes == MOST_PASSES:
            return None
        self._passes += 1
        for batch, count in parts:
            found = find_faulty_layer(self._model, self._ops, self._held, batch, count, cache)
            if found is not None:
                return found
        return None


def find_parameter(held: Mapping[str, Tensor]) -> str | None:
    for name, tensor in held.items():
        count, first = count_bad(tensor, is_scale=name.endswith("scale"))
        if count:
            place = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
            verb = "number is" if count == 1 else "numbers are"
            return f"of parameter {name} {count:,} {verb} NaN or infinite, the first at {place} of {list(tensor.shape)}"
    return None


def count_bad(tensor: Tensor, is_scale: bool) -> tuple[int, int]:
    """How many numbers are not finite, and the place of the first, counted through. Integer codes always are; integers
    that are scales hold exponents (E8M0), one in a byte or several in a word: there the word counts."""
    if not (tensor.is_floating_point() or is_scale):
        return 0, 0
    flat, count, first = tensor.reshape(-1), 0, 0
    for start in range(0, len(flat), JUDGED_AT_ONCE):
        bad = find_bad(flat[start : start + JUDGED_AT_ONCE])
        found = int(bad.sum())
        if found and not count:
            first = start + int(bad.int().argmax())
        count += found
    return count, first


def find_bad(numbers: Tensor) -> Tensor:
    """bool [n], of numbers or scales [n]."""
    if numbers.dtype == torch.float8_e4m3fn:  # the one code without its sign; conversion would take 6 times as long
        return (numbers.view(torch.uint8) & 0x7F) == 0x7F
    return ~read_scale(numbers).isfinite().view(len(numbers), -1).all(1)


class NotFinite(Exception):
    """What is not finite, in words. Ends a pass."""


class Watching:
    """A family's operations in plain torch, ended by the first residual that is not finite.

    Where in the model an operation stands is told by the parameters that it is given: `held` has their names.
    """

    def __init__(self, ops: Any, held: Mapping[str, Tensor], batch: Batch, count: int) -> None:
        """`count`: tokens of the batch; those behind them are padding."""
        self._ops, self._batch, self._count = ops, batch, count
        self._names = {id(tensor): name for name, tensor in held.items()}

    def for_batch(self, batch: Batch) -> "Watching":
        self._ops = self._ops.for_batch(batch)
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._ops, name)

        def watched(*args: Any) -> Any:
            result = operation(*args)
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Residual):
                    for numbers in list_tensors(part.value):
                        self.check(self._describe(name, args), numbers)
            return result

        return watched

    def check(self, what: str, x: Tensor) -> None:
        """Raise NotFinite, with `what` and a place, unless numbers [T, ...] are finite."""
        is_finite = x[: self._count].flatten(1).isfinite()
        if not bool(is_finite.all()):
            token = int((~is_finite.all(1)).int().argmax())
            place = f"at position {int(self._batch.positions[token])} (token {int(self._batch.tokens[token])})"
            raise NotFinite(f"{what}, {place}")

    def _describe(self, name: str, args: Sequence[Any]) -> str:
        if name == "begin":
            return "the embedding is the first that is not finite"
        given = sorted(list_tensors(args), key=lambda t: t.ndim == 1)  # a norm may be the next block's
        names = (self._names[id(t)] for t in given if id(t) in self._names)
        module = next(names, name + ".").rpartition(".")[0]
        return f"{module} is the first whose output is not finite"


def list_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples: the fields of a Matrix, of an Mlp."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from list_tensors(item)


def find_faulty_layer(
    model: Model, ops: Any, held: Mapping[str, Tensor], batch: Batch, count: int, cache: Cache
) -> str | None:
    """The model's forward pass on the operations `ops` over the first `count` tokens of a batch of one request, up to
    what is not finite."""
    watching = Watching(ops, held, batch, count)
    try:
        hidden = model.with_ops(watching).forward(batch, cache)
        watching.check("model.norm is the first whose output is not finite", hidden)
    except NotFinite as found:
        return str(found)
    if not bool(model.logits(hidden[count - 1 : count]).isfinite().all()):
        return "lm_head is the first whose output is not finite"
    return None


class Failures:
    """Those of one engine. `causes`: None where nobody can look into the model."""

    def __init__(
        self,
        causes: Causes | None,
        scheduler: Scheduler,
        buffers: Buffers,
        cache: Cache,
        device: torch.device | str,
    ) -> None:
        self._causes, self._scheduler, self._buffers = causes, scheduler, buffers
        self._cache, self._device = cache, device
        self._unexplained: list[tuple[Job, int]] = []  # and where the numbers that are not finite came up

    @property
    def are_open(self) -> bool:
        """Whether an error of a job has not been explained yet."""
        return bool(self._unexplained)

    def note(self, job: Job, position: int) -> str:
        """Note that a job has no answer: what follows `position` is not finite. The cause is sought between steps."""
        what = "log-probabilities" if job.request.targets is not None or job.params.logprobs is not None else "logits"
        job.error = f"there is no answer: the {what} behind position {position} are not finite (NaN or infinity)"
        self._unexplained.append((job, position))
        return "error"

    def note_banned(self, job: Job, position: int) -> str:
        """Note that a job has no answer: no token may follow `position`."""
        name = job.params.constraint[0] if job.params.constraint else "logit_bias"
        job.error = f"there is no answer: behind position {position} {name} and the other options ban every token"
        job.error_type = NoAnswerError
        return "error"

    def explain(self) -> None:
        """Add the cause to each new error of a job, as far as it can be found. Call it between steps."""
        while self._unexplained:
            job, position = self._unexplained.pop()
            cause = self._find_cause(job, position)
            if cause is not None:
                job.error = f"{job.error}; {cause}; `saccade check --contents` judges the checkpoint's numbers"

    @torch.inference_mode()
    def _find_cause(self, job: Job, position: int) -> str | None:
        """Look at the parameters, then run the tokens up to `position` again, in pages that are free."""
        if self._causes is None:
            return None
        pages, tokens = self._scheduler.pages, job.request.tokens[: position + 1]
        taken = list[int]()
        try:
            with on(self._device):
                cause = self._causes.find_parameter()
                if cause is None and count_pages(len(tokens)) <= pages.free:
                    taken = pages.take(count_pages(len(tokens)))
                    cause = self._causes.find_layer(self._lay_out(tokens, taken), self._cache)
            return cause
        except RuntimeError:  # memory that is not there: the error stands without its cause
            return None
        finally:
            pages.release(taken)

    def _lay_out(self, tokens: list[int], pages: list[int]) -> Iterator[RequestTokens]:
        """A request's tokens in batches; each is done with before the next."""
        most = self._scheduler.max_batch_tokens
        clear_states(self._cache, [0])  # no request's: between two steps nobody else writes there
        for start in range(0, len(tokens), most):
            some = tokens[start : start + most]
            yield RequestTokens(self._buffers.fill([Run(some, start, pages, 0)]), len(some))
