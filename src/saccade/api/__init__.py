"""The Python API: `LLM`, its settings and what it gives."""
