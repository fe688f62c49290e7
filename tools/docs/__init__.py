"""The documentation as a site: `python -m tools.docs`, or `make docs`."""
