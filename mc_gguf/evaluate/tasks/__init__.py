"""Tasks of lm-evaluation-harness on a GGUF.

- runner.py         runs tasks; imports lm_eval only when a task is asked for
- harness.py        the harness's model class over our Llama
- continuations.py  the computing behind it: many short sequences that share what they begin with
"""
