"""Compares what somebody answers with what a checkpoint says: where they part, by how much, and what explains it.

The other side's own tokens are scored in fp32, teacher-forced, and again as each variant of variants/table.py computes
them: those that are surely nearer are what the other side does. Next: explain.py, report.py.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from saccade.api.llm import LLM
from saccade.checkpoint.open import open_model
from saccade.compare.answers import Answerer, ComparedPrompt, GivenAnswer, check_answer
from saccade.compare.bars import FIT_SHARE, ROUNDING_MARGIN, USUAL_BF16, USUAL_FP8, RoundingBar, Spread
from saccade.compare.explain import Cause, Explainer, find_selection_bar
from saccade.compare.readings import find_reading, spell_token
from saccade.compare.report import ComparedText, ComparisonReport, Departure, Finding, Fit, LayerLook, ReadingDifference
from saccade.compare.scoring import Forced, ScoredText, force
from saccade.compare.variants.table import AS_STORED, BF16, FP8, Variant, list_hypotheses
from saccade.errors import CheckpointError, RequestError
from saccade.eval.arrangements import Projection
from saccade.eval.indexers import read_projections
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import DSA, find_family

SHOWN_FITS = 5
TOLD_APART = 4.0  # a variant explains a token if it is so many times nearer than the checkpoint
LEAST_START = 1e-4  # nats: less is no token that anybody would look at
OTHER_WEIGHTS = 1.0  # nats in the mean: no fault of arithmetic looks so where every token is selected


class Comparer:
    """One checkpoint, ready to be compared with."""

    def __init__(self, llm: LLM, tell: Callable[[str], None] = lambda _: None) -> None:
        self.llm, self.tell, self.config = llm, tell, llm.config
        is_known = find_family(llm.config.model_type) is DSA  # other families' configs are ModelConfigs too
        self.model: Transformer | None = llm.model if is_known else None  # type: ignore[assignment]

    def force(self, variant: Variant, tokens: Sequence[int]) -> Forced:
        """Tokens in a variant. A family without variants is scored by its engine, without selections."""
        if self.model is None:
            return Forced(torch.tensor(self.llm.score(tokens)), [])
        return force(self.model, variant, tokens, self.llm.settings.device)

    def compare(self, answerer: Answerer, prompts: Sequence[ComparedPrompt], max_tokens: int) -> ComparisonReport:
        """Ask, score and judge. Raises RequestError for what cannot be compared."""
        asked, readings, notes = list[ScoredText](), list[ReadingDifference](), list[str]()
        for prompt, given in self.ask(answerer, prompts, max_tokens):
            text, difference = self.score(prompt, given)
            readings += [] if difference is None else [difference]
            if text is None:
                notes.append(f"prompt {prompt.name} is left out of the numbers: how it was read is not known")
            else:
                asked.append(text)
        topk = getattr(self.config, "index_topk", 0)
        if not any(len(text.tokens) > topk for text in asked):
            notes.append(f"no text is longer than index_topk ({topk}): no indexer was tested")
        if any(text.first == text.prompt for text in asked):
            notes.append("some prompts come without log-probabilities (chats, no echo): of these, answers are compared")
        return self.judge(answerer.title, asked, readings, notes)

    def ask(
        self, answerer: Answerer, prompts: Sequence[ComparedPrompt], max_tokens: int
    ) -> list[tuple[ComparedPrompt, GivenAnswer]]:
        """Every answer. RequestError before any is asked for if a prompt does not fit."""
        limit = min(self.llm.settings.max_length, self.llm.settings.cache_tokens)
        read = [prompt.read(self.llm) for prompt in prompts]
        for prompt, tokens in zip(prompts, read, strict=True):
            if len(tokens) + max_tokens > limit:
                text = f"{len(tokens)} tokens and an answer of {max_tokens} are more than {limit}"
                raise RequestError(f"prompt {prompt.name}: {text}, the context or the cache")
        found = []
        for prompt, tokens in zip(prompts, read, strict=True):
            self.tell(f"asking: {prompt.name}, {len(tokens)} tokens")
            given = answerer.answer(prompt, tokens, max_tokens)
            found.append(
                (prompt, check_answer(given, self.config.vocab_size, f"{answerer.title}: prompt {prompt.name}"))
            )
        return found

    def score(self, prompt: ComparedPrompt, given: GivenAnswer) -> tuple[ScoredText | None, ReadingDifference | None]:
        """The text as the checkpoint scores it, and whether its prompt was read otherwise."""
        ours = prompt.read(self.llm)

        def find_left(tokens: Sequence[int]) -> Tensor:
            found = self.force(AS_STORED, [*tokens, *given.tokens]).logprobs
            return torch.tensor(given.logprobs) - found[len(tokens) - 1 :]

        tokens, difference = find_reading(self.llm, prompt, ours, given, find_left)
        if tokens is None or not given.tokens:
            return None, difference
        echoed = (
            given.prompt_logprobs if given.prompt_logprobs and len(given.prompt_logprobs) == len(tokens) - 1 else []
        )
        theirs = torch.tensor([*echoed, *given.logprobs])
        exact = self.force(AS_STORED, [*tokens, *given.tokens])
        return ScoredText(prompt.name, [*tokens, *given.tokens], len(tokens), theirs, exact), difference

    def judge(
        self, other: str, asked: Sequence[ScoredText], readings: list[ReadingDifference], notes: list[str]
    ) -> ComparisonReport:
        """What the differences mean."""
        spread, rounded = Spread.of([text.leave(text.exact) for text in asked]), self.round(asked)
        bars = self.measure_bars(asked, rounded)
        rounding = find_rounding(bars, spread)
        fits, causes = list[Fit](), list[Cause]()
        if asked and self.model is not None:
            explainer = Explainer(asked, self.force, rounded, self.tell)
            fits, causes = explainer.find(list_hypotheses(self.model, self.read_indexers()))
            causes = causes if explains_all(causes, bars, spread, rounding) else []
        bar, topk, selection_bar = bars[0].token, getattr(self.config, "index_topk", 0), None
        if asked and not causes and rounding == FP8.name and rounded:
            selection_bar = find_selection_bar(asked, rounded[-1], topk)
        if selection_bar is not None:  # what comes before is this engine's rounding
            bar = ROUNDING_MARGIN * selection_bar
        texts = [self.describe(text, i, causes, bar) for i, text in enumerate(asked)]
        findings = [
            Finding("template" if r.is_chat else "tokenizer", "tokens", r.text, r.name, r.place) for r in readings
        ]
        findings += [self.name_cause(asked, cause) for cause in causes]
        if asked and not causes and not rounding:
            findings.append(self.name_unknown(texts, spread))
        elif selection_bar is not None:
            findings.append(name_selection(texts, topk))
        return ComparisonReport(
            model=self.llm.settings.path,
            dtype=self.llm.settings.dtype,
            other=other,
            index_topk=topk,
            texts=texts,
            readings=readings,
            spread=spread,
            bars=bars,
            fits=fits[:SHOWN_FITS] if causes or not rounding else [],
            findings=findings,
            rounding=rounding,
            notes=notes,
        )

    def round(self, asked: Sequence[ScoredText]) -> list[list[Tensor]]:
        """What runs that only round say of each text."""
        if self.model is None:
            return []
        self.tell("measuring rounding")
        return [[text.part(self.force(v, text.tokens).logprobs) for text in asked] for v in (BF16, FP8)]

    def measure_bars(self, asked: Sequence[ScoredText], rounded: Sequence[Sequence[Tensor]]) -> list[RoundingBar]:
        """The strictest first."""
        if not rounded:
            return [RoundingBar(BF16.name, Spread(*USUAL_BF16)), RoundingBar(FP8.name, Spread(*USUAL_FP8))]
        exact = [text.part(text.exact.logprobs) for text in asked]
        return [
            RoundingBar(v.name, Spread.of([a - b for a, b in zip(said, exact, strict=True)]))
            for v, said in zip((BF16, FP8), rounded, strict=True)
        ]

    def read_indexers(self) -> Mapping[int, Projection]:
        try:
            return read_projections(*open_model(self.llm.settings.path), self.llm.settings.device)[0]  # type: ignore[arg-type]
        except CheckpointError as error:
            self.tell(f"note: wk cannot be varied: {error}")
            return {}

    def describe(self, text: ScoredText, place: int, causes: Sequence[Cause], bar: float) -> ComparedText:
        """A text, with the token where the other side leaves the checkpoint if it does."""
        explained = causes[-1].said[place] if causes else None
        differences = text.leave(text.exact).abs()
        if explained is None:
            row = find_first(differences > bar)
        else:
            row = find_start(differences, text.leave(explained).abs(), causes[-1].fit.left.mean)
        departure = None if row is None else self.look(text, row, text.exact, explained)
        answer = len(text.tokens) - text.prompt
        return ComparedText(text.name, text.prompt, answer, len(differences), Spread.of([differences]), departure)

    def look(self, text: ScoredText, row: int, before: Forced, explained: Forced | None) -> Departure:
        """The token at a row of what is compared, and what each layer selected when it was chosen: `before`, and in
        what explains it."""
        place = text.first + row
        looks = []
        for layer, selection in enumerate(before.selections):
            selected = [int(i) for i in selection[place - 1] if i >= 0]
            theirs = None if explained is None else set(explained.selections[layer][place - 1].tolist())
            looks.append(LayerLook(layer, selected, None if theirs is None else len(theirs.intersection(selected))))
        exact = float(text.exact.logprobs[place - 1])
        said = None if explained is None else float(explained.logprobs[place - 1])
        token = text.tokens[place]
        return Departure(place, token, spell_token(self.llm, token), float(text.theirs[row]), exact, said, looks)

    def name_cause(self, asked: Sequence[ScoredText], cause: Cause) -> Finding:
        """A cause, with the first token that shows it."""
        starts = []
        for i, (text, before, said) in enumerate(zip(asked, cause.before, cause.said, strict=True)):
            row = find_start(text.leave(before).abs(), text.leave(said).abs(), cause.fit.left.mean)
            starts += [] if row is None else [(text.first + row, i, row)]
        variant = cause.variant
        if not starts:
            return Finding(variant.kind, variant.name, f"the other side {variant.text}")
        place, i, row = min(starts)
        departure = self.look(asked[i], row, cause.before[i], cause.said[i])
        return Finding(variant.kind, variant.name, f"the other side {variant.text}", asked[i].name, place, departure)

    def name_unknown(self, texts: Sequence[ComparedText], spread: Spread) -> Finding:
        prompt, place, departure = find_earliest(texts)
        topk = getattr(self.config, "index_topk", 0)
        if place is not None and place <= topk and spread.mean > OTHER_WEIGHTS:
            told = "other weights, or another model: even short texts differ"
            return Finding("fault", "weights", told, prompt, place, departure)
        where = ""
        if place is not None and topk and place <= topk:
            where = f"; it starts within the first {topk} tokens, all of which are selected: not in an indexer's choice"
        told = f"more than rounding, and no known fault explains it{where}"
        return Finding("unknown", "unknown", told, prompt, place, departure)


def name_selection(texts: Sequence[ComparedText], topk: int) -> Finding:
    told = (
        f"selects other tokens: it differs only behind token {topk}, where indexers choose; no known fault explains it"
    )
    return Finding("unknown", "selection", f"the other side {told}", *find_earliest(texts))


def find_earliest(texts: Sequence[ComparedText]) -> tuple[str | None, int | None, Departure | None]:
    """Prompt, place and token of the first departure."""
    starts = [(text.departure.place, i) for i, text in enumerate(texts) if text.departure is not None]
    if not starts:
        return None, None, None
    place, i = min(starts)
    return texts[i].name, place, texts[i].departure


def find_rounding(bars: Sequence[RoundingBar], spread: Spread) -> str:
    """The strictest bar that holds it; "" for none."""
    return next((bar.name for bar in bars if bar.holds(spread)), "")


def explains_all(causes: Sequence[Cause], bars: Sequence[RoundingBar], spread: Spread, rounding: str) -> bool:
    """Whether what is left is rounding; and, where there was more than that, much less than there was."""
    if not causes:
        return False
    left = causes[-1].fit.left
    return bool(find_rounding(bars, left)) and (bool(rounding) or left.mean <= FIT_SHARE * spread.mean)


def find_start(before: Tensor, left: Tensor, noise: float) -> int | None:
    """The first row at which an explanation is much nearer, and not by what it leaves elsewhere."""
    return find_first((before > max(noise, LEAST_START)) & (before > TOLD_APART * left))


def find_first(is_there: Tensor) -> int | None:
    rows = is_there.nonzero()
    return int(rows[0]) if len(rows) else None
