// ggml's flash attention operation as a problem of ours.
#pragma once

#include <string>
#include <vector>

#include "abi.h"
#include "host.h"
#include "settings.h"
#include "sparsek/attention.h"

namespace sparsek::ggml {

// Why a flash attention operation is none that `operation_of` can express; empty: it is one.
std::string obstacle(const Host& host, const Tensor* op);

// Whether there are so few queries for a sequence that this is generation, and no prompt.
bool is_step(const Tensor* op);

// Why the host is faster; empty: it may not be. Over short contexts a step of generation is too short to be
// handed over.
std::string drawback(const Tensor* op, const Settings& settings);

// The number of the layer, from the name of its part of the KV cache; -1 where that has none.
int64_t layer_of(const Tensor* op);

// The operation as a problem, and where its output goes. Its rule is not set.
struct Operation {
    Problem problem;
    Output out;
    std::vector<float> slopes;  // of ALiBi, to which the problem points
};
Operation operation_of(const Tensor* op);

// Whether keys and values are in Q8_0, which the core does not read: `operation_of` leaves them out then, and
// each key/value head is an operation of its own, whose keys and values are unpacked to `room`. The mask of
// the whole is in bits.
bool is_packed(const Tensor* op);
Operation unpacked(const Host& host, const Tensor* op, const Operation& whole, int64_t sequence,
                   int64_t kv_head, std::vector<float>& room);

}  // namespace sparsek::ggml
