"""What the runtime computes while it evaluates a text, and what a change of it does to the output.

    with open_runtime(path, options) as context:
        spool = capture(context, ...)

llama.cpp evaluates the text, so every architecture that it runs can be measured; its eval callback hands over
the tensors of the graph (graph.py). What later steps need of them lies in a spool on the disk (spool.py).
"""
