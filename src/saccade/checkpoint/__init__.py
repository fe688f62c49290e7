"""Files of a checkpoint: headers, encodings, reading and writing. Knows no model. Next: index.py, encoding.py."""
