"""Text <-> token ids: messages, prompts, replies and saved conversations. Knows no engine and no torch."""
