"""Block operations: what a model is written in, at the granularity at which a GPU fuses.

`interface` names them, `reference` computes each in a few lines of plain torch and is the specification, `gpu` is the
table that says which kernel serves which number of tokens.
"""
