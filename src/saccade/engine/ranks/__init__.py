"""One engine on every rank of a model. Start at replicate.py."""
