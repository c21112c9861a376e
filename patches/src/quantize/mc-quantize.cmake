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
if (GGML_NATIVE AND NOT MSVC)
    target_compile_options(mc-quantize PRIVATE -march=native)
endif()
add_dependencies(llama mc-quantize)
