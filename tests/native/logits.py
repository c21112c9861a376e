"""Compute logits of models with the libraries in a given folder, patched or not.

This is a program of its own because a process can hold only one libllama.

    python logits.py LIB_DIR OUT.npz MODEL [MODEL...] --batches 1,7,512 --threads 1,2 [--repack]

OUT holds an array [batch, n_vocab] for each model and setting, named "<stem> <batch> <threads>".
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np


def logits_of(llama: Any, model: Any, tokens: list[int], threads: int) -> np.ndarray[Any, Any]:
    """Logits [len(tokens), n_vocab] after one batch in a fresh context."""
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), n_vocab)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lib_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--threads", default="2")
    parser.add_argument(
        "--repack", action="store_true", help="let the CPU backend repack weights (llama.cpp's default)"
    )
    options = parser.parse_args()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(options.lib_dir)
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    arrays = {}
    for path in options.models:
        params = llama.llama_model_default_params()
        params.use_extra_bufts = options.repack
        model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"{path} does not load"
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        tokens = np.random.default_rng(0).integers(3, n_vocab, 512).tolist()
        for batch in map(int, options.batches.split(",")):
            for threads in map(int, options.threads.split(",")):
                arrays[f"{path.stem} {batch} {threads}"] = logits_of(llama, model, tokens[:batch], threads)
        llama.llama_model_free(model)
    np.savez(options.out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
