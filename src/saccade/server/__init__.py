"""`saccade serve`: HTTP before an engine that runs in a process of its own. The parent imports no torch."""
