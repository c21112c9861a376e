// Stands in for the header of upstream's common library: test-llama-archs.cpp, which includes it, is built to write models, and its
// own tests, which need batches, are not run.
#pragma once

#include "llama.h"

#include <cstdlib>
#include <string>
#include <vector>

struct common_batch {
    explicit common_batch(llama_context *) {}
    void add(llama_token, llama_pos, llama_seq_id, bool) { abort(); }
    void clear() { abort(); }
    llama_batch_ext * get() { abort(); }
    llama_batch_ext * get_sub_batch(int, int) { abort(); }
};

inline void common_init() {}
