"""Model families: each folder holds a family's forward pass over the block operations. Next: dsa/transformer.py."""
