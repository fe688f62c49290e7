"""Operations on tensors. `reference` is the specification; faster files have the same signatures."""

PAGE = 64  # tokens in one page of the cache

# What products of many tokens see of their input: 16 bits of a number or more; 8, as BF16; or e4m3 codes where the
# weights are FP8 by blocks, and BF16 elsewhere. See `round_inputs` in reference.py.
ACTIVATION_NAMES = ("exact", "bf16", "fp8")
