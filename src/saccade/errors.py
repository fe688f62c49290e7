"""Everything that can go wrong in a way a user can mend.

Each error is one clear line: the thing, what was expected, what was found, the likely cure. This module is the
leftmost but for printable.py. A `Problem` is a finding as data; see plan/check.py for who collects them.
"""

from typing import Any, NamedTuple, Self

from saccade.base.printable import escape, escape_lines


class Problem(NamedTuple):
    """One reason why a checkpoint cannot be loaded, found before a tensor byte is read."""

    kind: str  # a short slug, the same for every problem of its sort: "missing", "truncated", "shape", ...
    name: str  # the tensor, file or parameter it is about
    text: str  # what was expected, what was found, the likely cure; without the name


class SaccadeError(Exception):
    """Any error that Saccade raises on purpose. The CLI prints its text and no traceback.

    What a terminal would obey is escaped in the text, wherever that will be printed."""

    def __init__(self, message: str = "", **named: Any):
        super().__init__(escape_lines(message), **named)  # `named`: of an ImportError, for those that are one

    @classmethod
    def at(cls, where: object, text: str) -> Self:
        """`WHERE: TEXT`, for a path or another name that may hold anything, a newline too."""
        return cls(f"{escape(str(where))}: {text}")


class ConfigError(SaccadeError):
    """config.json is missing, unreadable, of another model, or asks for something the engine cannot honour."""


class CheckpointError(SaccadeError):
    """The checkpoint cannot be opened at all: no such path, no safetensors file, no such repository."""


class PlanError(SaccadeError):
    """The checkpoint opened, but a complete load cannot be proven; `problems` holds every reason."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()):
        super().__init__(message)
        self.problems = problems


class LoadError(SaccadeError):
    """A tensor was fed that the plan refuses, `finish()` was called before everything had come, or what was asked for
    needs weights that the checkpoint does not have."""


class ConvertError(SaccadeError):
    """A checkpoint cannot be converted as asked, or the result cannot be written where it should go."""


class ContentsError(ConvertError):
    """The numbers of a checkpoint are unsound, as `saccade check --contents` says: converted, nobody could tell."""


class MemoryRefusedError(SaccadeError):
    """The system or a GPU refuses memory that the estimates allowed; the text says for what."""


class RequestError(SaccadeError):
    """A prompt or a sampling option that cannot be served."""


class NoAnswerError(SaccadeError):
    """A request ended without an answer: no token was left that its grammar and its options allow.

    `completions`: from `generate`, one for each prompt, in order. Those that failed have `error`; the others are whole.
    """

    def __init__(self, message: str, completions: tuple[Any, ...] = ()):
        super().__init__(message)
        self.completions = completions


class NumericsError(NoAnswerError):
    """A request came to logits or log-probabilities that are NaN or infinite: it has no answer."""


class RankError(SaccadeError):
    """The ranks of a model cannot begin together, or one of them is gone: it died, hangs, or has no memory. The text
    names the rank, its host and the reason; the others have ended too."""


class MissingPackageError(SaccadeError, ImportError):
    """What was asked for needs a package that is not installed: `pip install 'saccade[run]'` brings all that run a
    model, `'saccade[serve]'` those that serve one, `pip install saccade` those that read headers."""


READERS = ("typer", "rich", "httpx", "huggingface_hub")  # packages that every installation has
SERVERS = ("fastapi", "starlette", "uvicorn", "h11", "pydantic", "prometheus_client", "jinja2", "xgrammar")


def explain_missing(error: ModuleNotFoundError, who: str) -> ImportError:
    """A missing package as a MissingPackageError with its cure; a missing module of ours, which is a bug, as it is."""
    package = (error.name or "saccade").partition(".")[0]
    if package == "saccade":
        return error
    extra = "saccade" if package in READERS else "'saccade[serve]'" if package in SERVERS else "'saccade[run]'"
    text = f"{who} needs the package {package}, which is not installed; `pip install {extra}` brings it"
    return MissingPackageError(text, name=package)
