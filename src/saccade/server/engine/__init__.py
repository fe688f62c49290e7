"""The engine of a server, in a process of its own, and its two ends. Start at wire.py."""
