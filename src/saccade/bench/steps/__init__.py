"""Steps of a model: decode, drafts, prefill, the start of a process."""
