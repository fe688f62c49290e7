"""Replicas of a model on a cluster, by Ray Serve. Start at replicas.py."""
