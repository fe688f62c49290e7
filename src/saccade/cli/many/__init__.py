"""Many prompts of one file: what its lines ask for, where answers go, and the answers themselves."""
