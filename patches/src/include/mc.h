#pragma once

// C API of mc_gguf's patches, next to llama.h.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Digest of the patch set that this library was built with (the value of -DMC_PATCHSET at configure time).
LLAMA_API const char * mc_patchset(void);

#ifdef __cplusplus
}
#endif
