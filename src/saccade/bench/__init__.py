"""Benchmarks: commands that print their conditions, never timed tests."""
