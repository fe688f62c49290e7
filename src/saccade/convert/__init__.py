"""One checkpoint out of another: `wk` in BF16, all of it in BF16, or the published FP8 layout. Start at convert.py."""
