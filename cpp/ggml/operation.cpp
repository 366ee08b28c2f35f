#include "operation.h"

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

namespace sparsek::ggml {
namespace {

// Parameters of the operation: scale of the scores, slope of ALiBi, softcap.
enum Parameter { kScale, kMaxBias, kSoftcap };

float parameter(const Tensor* op, Parameter which) {
    float x;
    std::memcpy(&x, op->op_params + which, sizeof x);
    return x;
}

size_t bytes_of(int type) { return type == kF32 ? 4 : 2; }

bool is_format(const Host& host, int type) {
    return type == kF32 || type == kF16 || type == kBF16 || (type == kQ8 && host.unpack_q8 != nullptr);
}

DType dtype_of(int type) { return type == kF32 ? DType::f32 : type == kF16 ? DType::f16 : DType::bf16; }

// Numbers (or blocks of them) lie next to each other, and rows a whole number of numbers apart.
bool has_rows(const Tensor* t) {
    if (t->type == kQ8) return t->stride[0] == kQ8Bytes && t->size[0] % kQ8Block == 0;
    const size_t bytes = bytes_of(t->type);
    return t->stride[0] == bytes && t->stride[1] % bytes == 0 && t->stride[2] % bytes == 0 &&
           t->stride[3] % bytes == 0;
}

int64_t stride(const Tensor* t, int axis) {
    return static_cast<int64_t>(t->stride[axis] / bytes_of(t->type));
}

// [size, tokens, heads, sequences]
sparsek::Tensor rows_of(const Tensor* t) { return {t->data, stride(t, 3), stride(t, 2), stride(t, 1)}; }

}  // namespace

std::string obstacle(const Host& host, const Tensor* op) {
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    if (op->op != host.flash_attention || q == nullptr || k == nullptr || v == nullptr)
        return "not flash attention";
    for (size_t i = 5; i < std::size(op->src); ++i) {
        if (op->src[i] != nullptr) return "more inputs than are known here";
    }
    if (!is_format(host, k->type) || v->type != k->type) return "the format of its cache";
    if (q->type != kF32 || op->type != kF32) return "its number format";
    constexpr const char* kLayout = "its memory layout";
    if (!has_rows(q) || !has_rows(k) || !has_rows(v) || op->stride[0] != 4) return kLayout;
    if (k->size[2] == 0 || q->size[2] % k->size[2] != 0 || v->size[2] != k->size[2]) return kLayout;
    if (k->size[3] != q->size[3] || v->size[3] != q->size[3] || v->size[1] != k->size[1]) return kLayout;
    const Tensor* sinks = op->src[4];
    if (sinks != nullptr && (sinks->type != kF32 || sinks->size[0] != q->size[2] || sinks->stride[0] != 4))
        return "its attention sinks";
    if (mask == nullptr) return "";
    const bool heads = mask->size[2] == 1 || mask->size[2] == q->size[2];
    const bool sequences = mask->size[3] == 1 || mask->size[3] == q->size[3];
    const bool good = mask->type == kF16 && has_rows(mask) && heads && sequences &&
                      mask->size[0] == k->size[1] && mask->size[1] >= q->size[1];
    return good ? "" : "its mask";
}

bool is_step(const Tensor* op) {
    constexpr int64_t kGeneration = 8;
    return op->src[0]->size[1] <= kGeneration;
}

std::string drawback(const Tensor* op, const Settings& settings) {
    if (!is_step(op)) return "";
    if (is_packed(op)) return "steps over a quantised cache";
    return op->src[1]->size[1] < settings.min_context ? "steps below min_context" : "";
}

int64_t layer_of(const Tensor* op) {
    // As in "cache_k_l12 (view)".
    for (const Tensor* t = op->src[1]; t != nullptr; t = t->view_src ? t->view_src : t->src[0]) {
        if (std::strncmp(t->name, "cache_k_l", 9) == 0) return std::atoi(t->name + 9);
    }
    return -1;
}

// The factors of ALiBi (Press et al., 2022) for the mask, head by head; empty without it. Powers of one
// number for as many heads as a power of two has, and odd powers of its root for the rest.
std::vector<float> slopes_of(float max_bias, int64_t heads) {
    std::vector<float> slopes;
    if (max_bias <= 0.0f) return slopes;
    int64_t even = 1;
    while (2 * even <= heads) even *= 2;
    const float step = max_bias / static_cast<float>(even);
    for (int64_t h = 0; h < heads; ++h)
        slopes.push_back(std::exp2(
            -step * (h < even ? static_cast<float>(h + 1) : static_cast<float>(2 * (h - even) + 1) / 2)));
    return slopes;
}

bool is_packed(const Tensor* op) { return op->src[1]->type == kQ8; }

Operation operation_of(const Tensor* op) {
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    Problem p;
    p.batch = q->size[3];
    p.heads = q->size[2];
    p.kv_heads = k->size[2];
    p.num_queries = q->size[1];
    p.num_keys = k->size[1];
    p.head_size = q->size[0];
    p.value_size = v->size[0];
    p.dtype = is_packed(op) ? DType::f32 : dtype_of(k->type);
    p.query_dtype = DType::f32;
    p.q = rows_of(q);
    if (!is_packed(op)) {
        p.k = rows_of(k);
        p.v = rows_of(v);
    }
    if (mask != nullptr) {
        p.mask = {mask->data,
                  Mask::Form::halves,
                  mask->size[3] > 1 ? stride(mask, 3) : 0,
                  mask->size[2] > 1 ? stride(mask, 2) : 0,
                  stride(mask, 1),
                  1};
    }
    // Cells of the cache have no order that could be known: what a row may see is in the mask alone, and the
    // last of it is its own position.
    p.first_position = p.num_keys;
    p.scale = parameter(op, kScale);
    p.softcap = parameter(op, kSoftcap);
    if (op->src[4] != nullptr) p.sink_logits = static_cast<const float*>(op->src[4]->data);
    std::vector<float> slopes = slopes_of(parameter(op, kMaxBias), p.heads);
    if (!slopes.empty()) p.slopes = slopes.data();
    return {p, {op->data, stride(op, 3), stride(op, 1), stride(op, 2)}, std::move(slopes)};
}

Operation unpacked(const Host& host, const Tensor* op, const Operation& whole, int64_t sequence,
                   int64_t kv_head, std::vector<float>& room) {
    const Problem& all = whole.problem;
    const int64_t group = all.heads / all.kv_heads, first = kv_head * group;
    const auto count = static_cast<size_t>(all.num_keys * (all.head_size + all.value_size));
    if (room.size() < count) room.resize(count);
    float* to = room.data();
    const auto unpack = [&](const Tensor* t, int64_t size) {
        const auto* rows = static_cast<const std::byte*>(t->data) +
                           static_cast<size_t>(sequence) * t->stride[3] +
                           static_cast<size_t>(kv_head) * t->stride[2];
        const float* start = to;
        for (int64_t j = 0; j < all.num_keys; ++j, to += size)
            host.unpack_q8(rows + static_cast<size_t>(j) * t->stride[1], to, size);
        return sparsek::Tensor{start, 0, 0, size};
    };
    Operation one = whole;
    Problem& p = one.problem;
    p.batch = p.kv_heads = 1;
    p.heads = group;
    if (p.slopes != nullptr) p.slopes += first;
    if (p.sink_logits != nullptr) p.sink_logits += first;
    p.k = unpack(op->src[1], all.head_size);
    p.v = unpack(op->src[2], all.value_size);
    p.q.data = static_cast<const float*>(p.q.data) + sequence * p.q.batch_stride + first * p.q.head_stride;
    one.out.data =
        static_cast<float*>(one.out.data) + sequence * one.out.batch_stride + first * one.out.head_stride;
    if (p.mask.data != nullptr) {
        p.mask.data = static_cast<const uint64_t*>(p.mask.data) + sequence * p.mask.batch_stride +
                      first * p.mask.head_stride;
    }
    if (p.bias.data != nullptr) {
        p.bias.data = static_cast<const uint16_t*>(p.bias.data) + sequence * p.bias.batch_stride +
                      first * p.bias.head_stride;
    }
    return one;
}

}  // namespace sparsek::ggml
