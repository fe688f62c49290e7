"""Products of activations with weight matrices: gemv (one or two tokens), split_k (up to 16), gemm (more)."""
