"""How close a GGUF is to its 16-bit model: perplexity, KL divergence, tasks."""
