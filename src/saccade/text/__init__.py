"""Tokens and text: the tokenizer, text as it comes, stop strings, the files beside a model. No torch."""
