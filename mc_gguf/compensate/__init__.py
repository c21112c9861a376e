"""Error compensation for whole models: Hessians of the experts' inputs, the blocks that lose least on
them, and the bank that keeps the blocks.
"""
