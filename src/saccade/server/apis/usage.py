"""What completions and chats tell alike: `usage` as OpenAI's APIs spell it, with cached prompt tokens and with drafts,
their "predictions"; `prompt_logprobs` as vLLM does.

Drafts come beside: `rejected_prediction_tokens` were never part of an answer, and are not in `completion_tokens`.
"""

from collections.abc import Sequence
from typing import Any

from saccade.server.engine.wire import Counts, TokenRow
from saccade.server.service import Service


def count_usage(
    prompt: int, generated: int, counts: Sequence[Counts], reasoning: int | None = None, prompts: int = 1
) -> dict[str, Any]:
    """`prompt` tokens of all `prompts`, each counted once for all answers to it; `generated` ones of all answers.
    `counts`: of each answer, those to the first prompt first. Found is what the first to look found: the others to the
    same prompt find what that one has computed."""
    n = max(1, len(counts) // prompts)
    cached = sum(min((c.cached for c in counts[i : i + n]), default=0) for i in range(0, len(counts), n))
    drafted, accepted = sum(c.drafted for c in counts), sum(c.accepted for c in counts)
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    if reasoning is not None:
        details["reasoning_tokens"] = reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": details,
    }


def write_prompt_logprobs(service: Service, rows: Sequence[TokenRow], most: int) -> list[dict[str, Any] | None]:
    """Of each token of a prompt: it and the likeliest `most`, by id. Nothing comes before the first one. A token that
    is not among the likeliest has no rank."""

    def write(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": service.spell(token).decode(errors="replace")}

    found = list[dict[str, Any] | None]([None])
    for token, logprob, top in rows:
        told = {str(one): write(one, number, rank) for rank, (one, number) in enumerate(top[:most], 1)}
        found.append({str(token): write(token, logprob, None)} | told)
    return found
