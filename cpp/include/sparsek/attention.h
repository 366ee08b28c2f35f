// Exact Sparse-K attention on the CPU: the problem, as plain structs, and the calls that solve it.
//
// The semantics are those of src/sparsek/kernels/reference.py. Nothing is checked here: sizes must fit, and
// pointers must be valid for the strides given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsek/cpu.h"

namespace sparsek {

enum class DType { f32, f16, bf16 };

// [batch, heads, tokens, size]; strides in elements, the last axis contiguous.
struct Tensor {
    const void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t token_stride = 0;
};

// [batch, heads, tokens, size], as a Tensor.
struct Output {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t token_stride = 0;
};

// [batch, heads, queries, keys]; strides in elements, 0 where it is the same for all. Without data every key
// is allowed.
struct Mask {
    enum class Form {
        bytes,   // nonzero where the key is allowed
        halves,  // half precision, added to the scores; -inf where the key is not allowed. key_stride is 1
        bits,    // 64 keys a word, 1 where the key is allowed; key_stride is not used
    };
    const void* data = nullptr;
    Form form = Form::bytes;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t query_stride = 0;
    int64_t key_stride = 0;
};

// What a row keeps.
struct Rule {
    int64_t top_k = 0;
    int64_t sinks = 0;
    int64_t window = 0;
    int64_t stride = 0;
    bool centroid_tail = false;
    float min_share = 0.0f;  // of the row's softmax; 0: as many as top_k says

    // Dense attention.
    bool keeps_all(int64_t num_keys) const { return top_k >= num_keys && min_share == 0.0f; }
    bool wants_means() const { return centroid_tail || min_share > 0.0f; }
};

struct Problem {
    int64_t batch = 0;
    int64_t heads = 0;
    int64_t kv_heads = 0;  // divides heads
    int64_t num_queries = 0;
    int64_t num_keys = 0;
    int64_t head_size = 0;
    int64_t value_size = 0;
    DType dtype = DType::f32;        // of k and v
    DType query_dtype = DType::f32;  // of q and the output
    Tensor q, k, v;
    Mask mask;
    bool is_causal = false;
    int64_t first_position = 0;  // of query 0; a causal row sees no later position than its own
    float scale = 1.0f;
    float softcap = 0.0f;  // 0: none; comes before what a mask adds
    // [heads] each, or null. slopes: factors of a mask of halves (ALiBi). sink_logits: of attention sinks,
    // each one more term exp(logit) in the softmax's sum, which has no value and no part in what is kept.
    const float* slopes = nullptr;
    const float* sink_logits = nullptr;
    Rule rule;
    // Of the call of which this is a part: the estimates behind `min_share` are made as there.
    int64_t whole_queries = 0;
    // A mask of halves, where it adds numbers; its bits are in `mask` then. attention() and select() make
    // both.
    Mask bias;
};

// Calls body(data) on up to `threads` threads at once, the calling one among them; returns when all have.
using Parallel = void (*)(void (*body)(void*), void* data, int threads);

struct Options {
    int num_threads = 1;
    Isa isa = Isa::portable;
    // Asked now and then by the calling thread; true ends the call early, its output undefined.
    bool (*interrupted)(void*) = nullptr;
    void* interrupted_data = nullptr;
    // The threads of the program around us, where they can be had: those of OpenMP go on spinning for a while
    // after each loop, and would keep ours from the processors. Without it threads are started.
    Parallel parallel = nullptr;
};

class KeyIndex;
class ValueMeans;

enum class Status {
    done,
    interrupted,
    // Nothing was computed: a half is NaN or infinity, or there are numbers to add to scores with a softcap
    // whose means are wanted.
    bad_mask,
};

// index: of the problem's k and v, extended by those it does not hold yet, with centroids where the rule
// wants means; means: of their values, which make few queries cheaper. Without them the call makes its own.
// Throws std::bad_alloc.
Status attention(const Problem& problem, const Options& options, const Output& out, KeyIndex* index = nullptr,
                 ValueMeans* means = nullptr);

// indices: int32 [batch, heads, num_queries, width], rising and padded with -1; counts: int32 [batch, heads,
// num_queries]. `width` must hold the longest row; without `indices` the rows are only counted. Returns and
// throws as attention does.
Status select(const Problem& problem, const Options& options, int64_t width, int32_t* indices,
              int32_t* counts);

}  // namespace sparsek
