"""From one checkpoint another: `wk` in BF16, the whole model in BF16, or the published FP8 layout. Start at convert.py."""
