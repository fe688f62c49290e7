"""Bytes of a checkpoint become parameters: the loader, one step of a plan, codes into numbers."""
