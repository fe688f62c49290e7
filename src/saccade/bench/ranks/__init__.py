"""Measurements by many ranks, and of what they send each other. Start at join.py."""
