"""How a model writes reasoning and calls: found by the markers in its chat template.

A template writes earlier answers of the model the way the model writes them. So no table of model names is needed, and
a new model with a known syntax works. Next: calls.py; parser.py, which reads answers.
"""

from dataclasses import dataclass

from saccade.chat.calls import CallSyntax, DsmlCalls, FencedCalls, TaggedCalls

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class Syntax:
    """The markers of one model."""

    has_reasoning: bool = False
    calls: CallSyntax | None = None
    drops_breaks: bool = False  # line breaks before the content belong to the format: GLM-4.5 writes one

    def is_reasoning_open(self, prompt: str) -> bool:
        """Whether the answer to `prompt` begins inside of the reasoning."""
        return self.has_reasoning and prompt.rstrip().endswith(THINK)

    def may_open_reasoning(self, prompt: str) -> bool:
        """Whether the model itself may begin its answer to `prompt` with reasoning."""
        return self.has_reasoning and not prompt.rstrip().endswith((THINK, THINK_END))


DEEPSEEK_V32 = Syntax(has_reasoning=True, calls=DsmlCalls())


def find_syntax(template: str) -> Syntax:
    """The syntax whose markers stand in `template`."""
    has_reasoning = THINK_END in template
    if TaggedCalls.key in template:
        return Syntax(has_reasoning, TaggedCalls(), drops_breaks=True)
    if "｜DSML｜" in template or "DSML" in template:
        block = "function_calls" if "function_calls" in template else "tool_calls"
        return Syntax(has_reasoning, DsmlCalls(block))
    if FencedCalls.begin in template:
        return Syntax(has_reasoning, FencedCalls(is_fenced="```json" in template))
    return Syntax(has_reasoning)
