"""Error compensation for whole models: the Hessians of the experts' inputs, the blocks that lose least on
these inputs, and the bank that keeps the blocks.
"""
