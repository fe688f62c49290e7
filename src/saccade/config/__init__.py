"""A model's config.json, read strictly."""
