"""Search for a better plan on the KL divergence of the model's output."""
