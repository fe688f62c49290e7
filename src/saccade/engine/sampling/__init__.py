"""What requests ask of the choice of a token, beyond temperature, top_k and top_p."""
