"""Mixture of experts: router, gate and up, down; grouped GEMM for many tokens."""
