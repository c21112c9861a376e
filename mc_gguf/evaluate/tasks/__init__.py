"""Tasks of lm-evaluation-harness on a GGUF."""
