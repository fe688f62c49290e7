"""Another checkpoint on this machine as the one who answers: `saccade compare A B`. Next: compare.py."""

from collections.abc import Sequence

from saccade.api.llm import LLM
from saccade.compare.answers import ComparedPrompt, GivenAnswer
from saccade.engine.params import SamplingParams


class LocalAnswers:
    """A model that runs here."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.title = llm, llm.settings.path

    def answer(self, prompt: ComparedPrompt, tokens: Sequence[int], max_tokens: int) -> GivenAnswer:
        """Greedy. As with a server, only messages are read by its own files."""
        read = prompt.read(self.llm)
        followed = read if prompt.messages is not None else list(tokens)
        room = min(self.llm.settings.max_length, self.llm.settings.cache_tokens) - len(followed)
        asked = SamplingParams(temperature=0.0, max_tokens=max(1, min(max_tokens, room)), logprobs=0, prompt_logprobs=0)
        made = self.llm.generate([followed], asked)[0]
        prompt_logprobs = [choice.logprob for choice in made.prompt_logprobs or ()]
        return GivenAnswer(made.token_ids, [c.logprob for c in made.logprobs or ()], prompt_logprobs, read, len(read))
