"""The model: tensors in, tensors out. Knows neither files nor requests, and no storage format.

Read transformer.py for the order of things, then attention.py and indexer.py. Each class takes its parameters from
`Weights` by name when it is built, and does its arithmetic through `ops`: kernels/reference.py or its fast equals.
"""
