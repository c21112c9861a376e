"""How close a GGUF is to its 16-bit model: perplexity, KL divergence, tasks.

- evaluation.py  a model on texts, from scores to results    - result.py    Result, its statistics, table
- text.py        a text and its chunks                       - report.py    the HTML report
- sequences.py   a Llama with several sequences              - scorer.py    a loaded model that scores chunks
- logprobs.py    numbers from logits; stored rows            - reference.py stored log-probabilities
- cache.py       where references are kept, and made         - files.py     a model's files and their hash
- tasks/         tasks of lm-evaluation-harness
"""
