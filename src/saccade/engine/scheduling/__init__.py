"""What the scheduler decides with: pages and their contents' keys, and how a step is divided. No torch."""
