"""What clients speak: OpenAI's and Anthropic's APIs, each in its own file."""
