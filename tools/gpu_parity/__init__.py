"""The fast kernels against the reference, on a GPU: `python -m tools.gpu_parity`."""
