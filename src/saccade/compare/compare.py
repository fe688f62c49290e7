"""Compares what somebody answers with what a checkpoint says: where they part, by how much, and what explains it.

The other side's own tokens are scored in fp32, teacher-forced. What is more than rounding is scored again in every
variant of variants.py; the one whose numbers agree to rounding is what the other side does. Next: report.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.api.llm import LLM
from saccade.checkpoint.open import open_model
from saccade.compare.answers import Answerer, ComparedPrompt, GivenAnswer, check_answer
from saccade.compare.bars import USUAL_BF16, USUAL_FP8, RoundingBar, Spread
from saccade.compare.readings import find_reading, spell_token
from saccade.compare.report import ComparedText, ComparisonReport, Departure, Finding, Fit, LayerLook, ReadingDifference
from saccade.compare.scoring import Forced, force
from saccade.compare.variants import AS_STORED, BF16, FP8, Variant, list_hypotheses
from saccade.errors import CheckpointError, RequestError
from saccade.eval.arrangements import Projection
from saccade.eval.indexers import read_projections
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import DSA, find_family

SCREENED = 3  # variants that are tried on all texts, after one text has ordered them
SHOWN_FITS = 5
TOLD_APART = 4.0  # a variant explains a token if it is so many times nearer than the checkpoint
OTHER_WEIGHTS = 1.0  # nats in the mean: no fault of arithmetic looks so where every token is selected


class ScoredText(NamedTuple):
    """A text that both sides have scored."""

    name: str
    tokens: list[int]  # prompt and answer
    prompt: int  # tokens of it
    theirs: Tensor  # f32 [compared]: log-probabilities of the last so many tokens
    exact: Forced

    @property
    def first(self) -> int:
        """The place of the first token that is compared."""
        return len(self.tokens) - len(self.theirs)

    def part(self, logprobs: Tensor) -> Tensor:
        """Of n - 1 log-probabilities those that are compared."""
        return logprobs[self.first - 1 :]

    @property
    def differences(self) -> Tensor:
        return self.theirs - self.part(self.exact.logprobs)


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
        spread, bars = Spread.of([text.differences for text in asked]), self.measure_bars(asked)
        rounding = next((bar.name for bar in bars if bar.holds(spread)), "")
        fits, best, found = list[Fit](), None, list[Forced]()
        # Between a plain mean and the bar lie formats: FP8 index keys moved it by 2 times what BF16 rounding does.
        is_plain = rounding == BF16.name and bars[0].is_plain(spread)
        if not is_plain and asked and self.model is not None:
            fits, best, found = self.explain(asked, spread, bars)
        findings = [
            Finding("template" if r.is_chat else "tokenizer", "tokens", r.text, r.name, r.place) for r in readings
        ]
        bar = bars[0].token
        texts = [self.describe(text, bar, found[i] if best else None) for i, text in enumerate(asked)]
        if best is not None or not rounding:
            findings += [self.name_finding(texts, best, spread)] if asked else []
        return ComparisonReport(
            model=self.llm.settings.path,
            dtype=self.llm.settings.dtype,
            other=other,
            index_topk=getattr(self.config, "index_topk", 0),
            texts=texts,
            readings=readings,
            spread=spread,
            bars=bars,
            fits=fits[:SHOWN_FITS],
            findings=findings,
            rounding=rounding,
            notes=notes,
        )

    def measure_bars(self, asked: Sequence[ScoredText]) -> list[RoundingBar]:
        """The strictest first."""
        if self.model is None:
            return [RoundingBar(BF16.name, Spread(*USUAL_BF16)), RoundingBar(FP8.name, Spread(*USUAL_FP8))]
        self.tell("measuring rounding")
        return [
            RoundingBar(v.name, Spread.of([t.part(self.force(v, t.tokens).logprobs - t.exact.logprobs) for t in asked]))
            for v in (BF16, FP8)
        ]

    def explain(
        self, asked: Sequence[ScoredText], spread: Spread, bars: Sequence[RoundingBar]
    ) -> tuple[list[Fit], Variant | None, list[Forced]]:
        """How well each variant fits, best first; the one that explains the differences, and what it says."""
        assert self.model is not None
        worst = max(asked, key=lambda text: float(text.differences.abs().mean()))
        screened: list[tuple[float, Variant]] = []
        for variant in list_hypotheses(self.model, self.read_indexers()):
            self.tell(f"trying: {variant.name}")
            left = worst.theirs - worst.part(self.force(variant, worst.tokens).logprobs)
            screened.append((float(left.abs().mean()), variant))
        screened.sort(key=lambda pair: pair[0])
        fits: list[tuple[Fit, Variant, list[Forced]]] = []
        for _, variant in screened[:SCREENED]:
            said = [self.force(variant, text.tokens) for text in asked]
            left_of = [t.theirs - t.part(forced.logprobs) for t, forced in zip(asked, said, strict=True)]
            fits.append((Fit(variant.kind, variant.name, variant.text, Spread.of(left_of)), variant, said))
        fits.sort(key=lambda item: item[0].left.mean)
        fit, variant, said = fits[0]
        # What BF16 rounding does not explain may be a format; what FP8 does not explain either, a fault on top of FP8.
        bar = bars[0] if bars[1].holds(spread) else bars[1]
        is_explained = bar.fits(fit.left, spread)
        return [item[0] for item in fits], variant if is_explained else None, said

    def read_indexers(self) -> Mapping[int, Projection]:
        try:
            return read_projections(*open_model(self.llm.settings.path), self.llm.settings.device)[0]  # type: ignore[arg-type]
        except CheckpointError as error:
            self.tell(f"note: wk cannot be varied: {error}")
            return {}

    def describe(self, text: ScoredText, bar: float, explained: Forced | None) -> ComparedText:
        """A text, with the token where the other side leaves the checkpoint if it does."""
        differences = text.differences.abs()
        if explained is not None:  # where the explanation is nearer
            left = (text.theirs - text.part(explained.logprobs)).abs()
            is_beyond = (differences > bar / 10) & (differences > TOLD_APART * left)
        else:
            is_beyond = differences > bar
        departure = None
        if bool(is_beyond.any()):
            departure = self.look(text, int(is_beyond.nonzero()[0]), explained)
        spread = Spread.of([differences])
        answer = len(text.tokens) - text.prompt
        return ComparedText(text.name, text.prompt, answer, len(differences), spread, departure)

    def look(self, text: ScoredText, row: int, explained: Forced | None) -> Departure:
        """The token at a row of what is compared, and what each layer selected when it was chosen."""
        place = text.first + row
        looks = []
        for layer, selection in enumerate(text.exact.selections):
            selected = [int(i) for i in selection[place - 1] if i >= 0]
            theirs = None if explained is None else set(explained.selections[layer][place - 1].tolist())
            looks.append(LayerLook(layer, selected, None if theirs is None else len(theirs.intersection(selected))))
        exact = float(text.exact.logprobs[place - 1])
        said = None if explained is None else float(explained.logprobs[place - 1])
        token = text.tokens[place]
        return Departure(place, token, spell_token(self.llm, token), float(text.theirs[row]), exact, said, looks)

    def name_finding(self, texts: Sequence[ComparedText], best: Variant | None, spread: Spread) -> Finding:
        starts = [(text.departure.place, text.name) for text in texts if text.departure is not None]
        place, prompt = min(starts) if starts else (None, None)
        if best is not None:
            return Finding(best.kind, best.name, f"the other side {best.text}", prompt, place)
        topk = getattr(self.config, "index_topk", 0)
        if place is not None and place <= topk and spread.mean > OTHER_WEIGHTS:
            return Finding(
                "fault", "weights", "other weights, or another model: even short texts differ", prompt, place
            )
        where = ""
        if place is not None and topk and place <= topk:
            where = f"; it starts within the first {topk} tokens, all of which are selected: not in an indexer's choice"
        return Finding(
            "unknown", "unknown", f"more than rounding, and no known fault explains it{where}", prompt, place
        )
