"""Carry a plan out: weights and plan into one GGUF."""
