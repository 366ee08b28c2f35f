// The llama.cpp that loaded us: its functions, found at run time in whatever library called, and whether its
// version is one that was tested. Nothing of ggml is linked.
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>

#include "abi.h"

namespace sparsek::ggml {

struct Host {
    int api_version;
    std::string version;
    int flash_attention;  // the number of the operation
    int passive[5];       // operations that compute nothing
    BufferType* cpu_buffer_type;

    bool is_passive(const Tensor* t) const {
        return std::find(std::begin(passive), std::end(passive), t->op) != std::end(passive);
    }

    bool (*is_host_buffer)(BufferType*);
    int (*graph_size)(Graph*);
    Tensor* (*graph_node)(Graph*, int);

    // A row of Q8_0 as float32; null where the host's Q8_0 is not the one that is known.
    void (*unpack_q8)(const void* from, float* to, int64_t count);

    // Runs a body on the threads of the host's OpenMP; null where it has none.
    void (*gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

    // For the comparison with the host's own kernel.
    struct InitParams {
        size_t size;
        void* memory;
        bool no_alloc;
    };
    void* (*init)(InitParams);
    void (*free)(void* context);
    Tensor* (*new_tensor)(void* context, int type, int axes, const int64_t* size);
    Tensor* (*flash_attention_of)(void* context, Tensor* q, Tensor* k, Tensor* v, Tensor* mask, float scale,
                                  float max_bias, float softcap);
    Graph* (*new_graph)(void* context);
    void (*build_forward)(Graph*, Tensor*);
    Backend* (*cpu_backend)(DeviceType, const char* parameters);
    void (*free_backend)(Backend*);
    int (*compute)(Backend*, Graph*);
};

// `caller`: an address inside the library that loads us. Throws std::runtime_error with one line that says
// what is wrong.
std::unique_ptr<Host> find_host(const void* caller);

}  // namespace sparsek::ggml
