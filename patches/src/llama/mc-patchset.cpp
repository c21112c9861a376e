#include "mc.h"

#ifndef MC_PATCHSET
#define MC_PATCHSET ""
#endif

const char * mc_patchset(void) {
    return MC_PATCHSET;
}
