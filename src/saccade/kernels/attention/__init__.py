"""Absorbed MLA over a selection: queries, the rows that tokens leave in the cache, sparse attention."""
