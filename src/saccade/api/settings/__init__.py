"""What a run is set to: every "auto" and None resolved, without torch."""
