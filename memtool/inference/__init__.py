"""A memory at work: predictions for pictures and answers to prompts, by batch."""
