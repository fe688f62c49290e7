"""What the bytes of a checkpoint say, beyond its headers. Begin with contents.py."""
