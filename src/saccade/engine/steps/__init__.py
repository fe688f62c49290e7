"""A step between its launch and what it brings."""
