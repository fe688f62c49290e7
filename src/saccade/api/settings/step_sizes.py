"""How many tokens a step has by default: where prompts run alone, and where some requests decode beside them.

The first is as many as a prompt pays for. In the second everybody who decodes waits for the prompt's tokens, so it has
as many as take 150 ms on an H200. Numbers, not measurements of this machine: the size of a step changes rounding, so it
must be the same in every run. Knows no torch. Next: resolve.py, which asks; engine/scheduler.py, which keeps to it.
"""

# Of one step: a prefill chunk. 512 fill a CPU's cores; on an H200 a first token of 8,192 takes 1.01 s in one chunk,
# 1.06 in two, and the index scores of 4,096 tokens at a context of 131,072 are 2.1 GB.
BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
# The longest gap between tokens, ms, and what a step takes of it before it has a prompt's tokens: steps of 512, 1,024,
# 2,048 and 4,096 tokens of DeepSeek-V3.2's rank of eight took 98, 167, 305 and 542 (`saccade bench chunks`, an H200).
LONGEST_GAP, BASE = 150.0, 35.0
# Operations a millisecond: 0.135 ms a token of that rank, which has 6.2e9 active parameters, and 0.049 of
# GLM-5.3-Flash's, which has 2.3e9.
RATE = 9.2e10
# Of the time with "exact" activations. A token of a prompt of 8,192 takes 0.047 ms of that rank in "fp8"; 12 layers
# took 112 ms in "bf16" where "fp8" took 99.
ACTIVATIONS_TIME = {"exact": 1.0, "bf16": 0.45, "fp8": 0.35}
LEAST_MIXED = 256  # also the smallest unit: steps of other sizes are padded up to the next bucket


def choose_mixed_tokens(kind: str, active: int, activations: str, most: int) -> int:
    """Tokens of a step in which some requests decode beside prompts, for a model of `active` parameters (active.py) on
    a device of `kind` "cpu" or "cuda". `most`: tokens of any step. On a CPU as many: its steps are of 512."""
    if kind == "cpu" or not active:
        return most
    tokens = int((LONGEST_GAP - BASE) / (2 * active / RATE * ACTIVATIONS_TIME[activations]))
    unit = max(LEAST_MIXED, 1 << max(0, tokens.bit_length() - 3))  # four sizes an octave, as buckets have (buffers.py)
    return min(most, max(LEAST_MIXED, tokens // unit * unit))
