"""DeepSeek Sparse Attention: DeepSeek-V3.2 and GLM-5. Tensors in, tensors out; knows neither files nor requests.

The layer is written once, over `ops`: what a module holds are parameters, taken from `Weights` by name, so that one
grep finds a name in a checkpoint, in the plan and here. Read transformer.py, decoder.py, attention.py, in this order.
"""
