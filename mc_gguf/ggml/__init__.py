"""ggml's types, its file format, its quantizers, and the library for error compensation."""
