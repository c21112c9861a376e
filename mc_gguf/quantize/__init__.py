"""A plan carried out: weights and plan into one GGUF."""
