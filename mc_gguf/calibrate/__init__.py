"""Measure every expert on text: use, importance matrices, the error of every type, what dropping costs."""
