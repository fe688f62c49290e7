"""`usage` as OpenAI's APIs spell it, with cached prompt tokens and with drafts, their "predictions".

Drafts come beside: `rejected_prediction_tokens` were never part of an answer, and are not in `completion_tokens`.
"""

from collections.abc import Sequence
from typing import Any

from saccade.server.wire import Counts


def count_usage(prompt: int, generated: int, counts: Sequence[Counts], reasoning: int | None = None) -> dict[str, Any]:
    """`prompt` tokens, counted once for all answers to them; `generated` ones of all answers."""
    drafted, accepted = sum(c.drafted for c in counts), sum(c.accepted for c in counts)
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    if reasoning is not None:
        details["reasoning_tokens"] = reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": min(prompt, max((c.cached for c in counts), default=0))},
        "completion_tokens_details": details,
    }
