"""What a comparison found, as data. Next: show.py prints it, compare.py makes it."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from saccade.compare.bars import RoundingBar, Spread, Votes


class LayerLook(NamedTuple):
    """What one layer's indexer selected for a token."""

    layer: int
    selected: list[int]  # places, as the checkpoint says
    kept: int | None  # how many of them the variant that explains the server selects too


@dataclass(frozen=True)
class Departure:
    """The token at which the other side leaves the checkpoint."""

    place: int  # in prompt and answer
    token: int
    spelled: str
    theirs: float  # log-probabilities
    checkpoint: float
    explained: float | None  # what the variant says that explains the server
    looks: list[LayerLook]


@dataclass(frozen=True)
class ComparedText:
    """A prompt with its answer."""

    name: str
    prompt_tokens: int
    answer_tokens: int
    compared: int  # tokens with log-probabilities of both sides
    spread: Spread
    departure: Departure | None


@dataclass(frozen=True)
class ReadingDifference:
    """A prompt that the other side reads as other tokens."""

    name: str
    is_chat: bool
    ours: int  # tokens
    theirs: int
    place: int | None  # of the first token that differs; None: nobody can tell
    our_token: str | None
    their_token: str | None
    is_inferred: bool  # from log-probabilities, because the server tells counts only

    @property
    def text(self) -> str:
        what = "chat template" if self.is_chat else "tokenizer"
        text = f"another {what}: prompt {self.name} has {self.theirs} tokens there, {self.ours} here"
        if self.place is None:
            return f"{text}; it does not tell which"
        how = ", by its log-probabilities" if self.is_inferred else ""
        ours, theirs = self.our_token or "the end", self.their_token or "the end"
        return f"{text}; the first that differs is token {self.place}: {theirs} there, {ours} here{how}"


class Fit(NamedTuple):
    """How well a variant explains the other side."""

    kind: str
    name: str
    text: str
    left: Spread  # differences that it leaves
    # Against what it was tried on, the checkpoint or the causes found before:
    gain: Votes  # whether it is nearer
    direction: Votes  # whether differences point there


@dataclass(frozen=True)
class Finding:
    """What is wrong, or different on purpose."""

    kind: str  # "template", "tokenizer", "format", "fault" or "unknown"
    name: str
    text: str
    prompt: str | None = None  # where it starts
    place: int | None = None
    departure: Departure | None = None  # that token


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison."""

    model: str
    dtype: str
    other: str
    index_topk: int
    texts: list[ComparedText]
    readings: list[ReadingDifference]
    spread: Spread  # of all texts
    bars: list[RoundingBar]
    fits: list[Fit]  # best first; empty where rounding explains everything
    findings: list[Finding]
    rounding: str  # which bar holds the differences: "bf16", "fp8" or ""
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["spread"] = self.spread._asdict()
        found["bars"] = [
            {"name": b.name, "measured": b.measured._asdict(), "mean": b.mean, "token": b.token} for b in self.bars
        ]
        found["fits"] = [{key: show_tuple(value) for key, value in fit._asdict().items()} for fit in self.fits]
        for text, made in zip(found["texts"], self.texts, strict=True):
            text["spread"] = made.spread._asdict()
        departures = [text.departure for text in self.texts] + [finding.departure for finding in self.findings]
        for place, departure in zip(found["texts"] + found["findings"], departures, strict=True):
            if departure is not None:
                place["departure"]["looks"] = [look._asdict() for look in departure.looks]
        return found


def show_tuple(value: Any) -> Any:
    """A named tuple as an object of JSON."""
    return value._asdict() if isinstance(value, Spread | Votes) else value
