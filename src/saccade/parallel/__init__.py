"""Many ranks of one model: what they hold together, and how they agree. Start at ranks.py."""
