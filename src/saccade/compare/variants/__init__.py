"""How engines compute a checkpoint otherwise: operations (operations.py) and their names (table.py)."""
