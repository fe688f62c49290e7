"""What any room may use: text and JSON as they are printed and read, file systems, memory, limits of the machine."""
