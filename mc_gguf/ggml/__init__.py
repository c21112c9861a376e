"""ggml's types, its file format and its quantizers, and the compensation library."""
