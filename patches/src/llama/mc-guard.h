#pragma once

// Where a failed assertion ends the process although the call is guarded (mc_guarded in mc.h): while a graph is computed, when
// exceptions would have to pass the code that holds the threads together.
struct mc_no_throw {
    mc_no_throw();
    ~mc_no_throw();
};
