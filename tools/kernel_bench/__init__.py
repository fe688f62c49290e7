"""Times of single kernels on the shapes of one of DeepSeek-V3.2's eight ranks, to choose between variants."""
