"""Measure every expert on text: how much it is used, its importance matrices, the error of every type, and
what dropping it costs.
"""
