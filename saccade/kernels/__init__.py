"""Operations on tensors. `reference` is the specification; faster files have the same signatures."""
