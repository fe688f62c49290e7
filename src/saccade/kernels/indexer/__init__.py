"""The lightning indexer: index logits of every earlier position, and the exact top k."""
