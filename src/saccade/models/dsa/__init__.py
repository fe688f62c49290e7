"""DeepSeek Sparse Attention: DeepSeek-V3.2 and GLM-5. Tensors in, tensors out; knows neither files nor requests.

The layer is written once, over `ops`. A module holds parameters and takes them from `Weights` by name. So one search
finds a name in a checkpoint, in the plan and here. Read transformer.py, decoder.py, attention.py, in this order.
"""
