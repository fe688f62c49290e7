"""What stands inside of requests: messages, blocks, items and tools, each API's in its own file."""
