"""Chats: messages become the text of a prompt, text of an answer becomes reasoning, content and calls. No torch."""
