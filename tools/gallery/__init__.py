"""Pictures of where the bundled model looks, for docs/gallery.md: `python -m tools.gallery`."""
