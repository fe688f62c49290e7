"""Layers that carry a state from token to token. Start at delta.py."""
