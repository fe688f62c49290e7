"""Requests in, tokens out: scheduling, pages, steps, drafts, graphs. Knows no files."""
