"""Kernels of a start, compiled by processes beside the load of weights."""
