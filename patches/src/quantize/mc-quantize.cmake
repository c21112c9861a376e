# libmc-quantize: a library of its own, which nothing at inference needs. Built with llama.

add_library(mc-quantize
    ${CMAKE_CURRENT_LIST_DIR}/api.cpp
    ${CMAKE_CURRENT_LIST_DIR}/codebook.cpp
    ${CMAKE_CURRENT_LIST_DIR}/codec.cpp
    ${CMAKE_CURRENT_LIST_DIR}/descent.cpp
    ${CMAKE_CURRENT_LIST_DIR}/formats.cpp
    ${CMAKE_CURRENT_LIST_DIR}/metric.cpp
    ${CMAKE_CURRENT_LIST_DIR}/scales.cpp)
target_include_directories(mc-quantize PRIVATE ${CMAKE_CURRENT_LIST_DIR}/../../ggml/src)
target_compile_features(mc-quantize PRIVATE cxx_std_17)
target_link_libraries(mc-quantize PRIVATE ggml-base)
set_target_properties(mc-quantize PROPERTIES POSITION_INDEPENDENT_CODE ON)
if (TARGET ggml-cpu)  # the instructions that the CPU backend is built for: native, GGML_AVX512, GGML_CPU_ARM_ARCH, ...
    get_target_property(MC_QUANTIZE_ARCH ggml-cpu COMPILE_OPTIONS)
    if (MC_QUANTIZE_ARCH)
        list(FILTER MC_QUANTIZE_ARCH INCLUDE REGEX "^(-m|/arch)")
        target_compile_options(mc-quantize PRIVATE ${MC_QUANTIZE_ARCH})
    endif()
endif()
if (NOT MSVC)  # vectors wider than the registers are passed within this library only, so their ABI does not matter
    target_compile_options(mc-quantize PRIVATE -Wno-psabi)
endif()
add_dependencies(llama mc-quantize)
