// Stands in for the header of upstream's common library: what test-llama-archs.cpp prints, without levels.
#pragma once

#include "ggml.h"

#include <cstdio>

#define LOG_LEVEL_DEBUG 4
#define LOG_LEVEL_ERROR 1
#define LOG(...)     printf(__VA_ARGS__)
#define LOG_INF(...) printf(__VA_ARGS__)
#define LOG_ERR(...) fprintf(stderr, __VA_ARGS__)

inline void common_log_set_verbosity_thold(int) {}
inline int  common_log_get_verbosity(ggml_log_level) { return 0; }
inline int  common_log_main() { return 0; }
inline void common_log_flush(int) {}
inline void common_log_add(int, ggml_log_level, const char *, const char *) {}
