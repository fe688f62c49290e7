"""Operations on tensors. `reference` is the specification; faster files have the same signatures."""

PAGE = 64  # tokens in one page of the cache
