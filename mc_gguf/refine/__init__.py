"""Refinement: search for a better plan on the real KL divergence, within the plan's own budget.

- refinement.py  refine_to_file(): text, search, check      - options.py    what is asked, what comes of it
- search.py      rounds of candidates                       - state.py      what is kept after every round
- expansion.py   gradients and curvature of the divergence  - memory.py     those of all rounds together
- program.py     the next candidates                        - budget.py     what may be chosen
- passes.py      the divergence of candidates               - matrices.py   experts in every type
- blocks.py      which quantized blocks are measured
"""
