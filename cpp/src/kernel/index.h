// Building the low-precision index of a head's keys.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename T>
inline const T* head_of(const Tensor& x, int64_t batch, int64_t head) {
    return static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride;
}

// The middle value; reorders x. NaN is taken as a large number.
inline float median(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (!(x[i] == x[i])) x[i] = 3e38f;
    }
    int64_t low = 0, high = n - 1;
    const int64_t k = n / 2;
    while (low < high) {  // Hoare's selection
        const float pivot = x[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] < pivot) ++i;
            while (x[j] > pivot) --j;
            if (i <= j) {
                const float t = x[i];
                x[i++] = x[j];
                x[j--] = t;
            }
        }
        if (k <= j) {
            high = j;
        } else if (k >= i) {
            low = i;
        } else {
            break;
        }
    }
    return x[k];
}

// Medians over blocks, so that a few enormous keys cannot spoil the precision of all others: they are
// clamped, and their blocks get a wide error bound.
template <typename T>
void fit_index(const Problem& p, int64_t batch, int64_t kv_head, const HeadIndex& index, float* scratch) {
    const int64_t size = p.head_size, blocks = blocks_of(p.num_keys);
    const T* keys = head_of<T>(p.k, batch, kv_head);
    const auto each_block = [&](auto&& of_block) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * kBlock;
            const int64_t count = p.num_keys - first < kBlock ? p.num_keys - first : kBlock;
            of_block(b, first, count);
        }
    };
    each_block([&](int64_t b, int64_t first, int64_t count) {
        for (int64_t c = 0; c < size; c += 16) {
            const int64_t n = size - c < 16 ? size - c : 16;
            F total = set1(0.0f);
            for (int64_t j = 0; j < count; ++j)
                total = total + load_n(keys + (first + j) * p.k.token_stride + c, n);
            float lanes[16];
            store(lanes, total * set1(1.0f / static_cast<float>(count)));
            for (int64_t i = 0; i < n; ++i) scratch[(c + i) * blocks + b] = lanes[i];
        }
    });
    for (int64_t d = 0; d < size; ++d) index.center[d] = median(scratch + d * blocks, blocks);
    each_block([&](int64_t b, int64_t first, int64_t count) {
        for (int64_t c = 0; c < size; c += 16) {
            const int64_t n = size - c < 16 ? size - c : 16;
            const F center = load_n(index.center + c, n);
            F widest = set1(0.0f);
            for (int64_t j = 0; j < count; ++j) {
                const F x = load_n(keys + (first + j) * p.k.token_stride + c, n) - center;
                widest = max(widest, max(x, set1(0.0f) - x));
            }
            float lanes[16];
            store(lanes, widest);
            for (int64_t i = 0; i < n; ++i) scratch[(c + i) * blocks + b] = lanes[i];
        }
    });
    for (int64_t d = 0; d < size; ++d) {
        float widest = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) {
            if (scratch[d * blocks + b] > widest) widest = scratch[d * blocks + b];
        }
        const float usual = 2.5f * median(scratch + d * blocks, blocks);
        const float range = usual > 0.0f && usual < widest ? usual : widest;
        index.scale[d] = range > 1e-30f && range < 1e30f ? range / 127.0f : 1.0f;
        index.inverse[d] = 1.0f / index.scale[d];
    }
}

// One block of keys in 8 bits, and the bounds of their rounding.
template <typename T>
inline void quantise_block(const Problem& p, const T* keys, const HeadIndex& index, int64_t b,
                           int64_t count) {
    const int64_t size = p.head_size, groups = (size + 3) / 4;
    uint8_t* packed = index.packed + b * kBlock * groups * 4;
    std::memset(packed, 128, static_cast<size_t>(kBlock * groups * 4));
    float residual = 0.0f, norm = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
        const T* key = keys + (b * kBlock + j) * p.k.token_stride;
        uint8_t* out = packed + slot_of(static_cast<int>(j)) * 4;
        F lost = set1(0.0f), left = set1(0.0f);
        for (int64_t c = 0; c < size; c += 16) {
            const int64_t n = size - c < 16 ? size - c : 16;
            float lanes[16];
            const F x = (load_n(key + c, n) - load_n(index.center + c, n)) * load_n(index.inverse + c, n);
            const F q = round(min(max(x, set1(-127.0f)), set1(127.0f)));
            lost = fma(x - q, x - q, lost);
            left = fma(q, q, left);
            store(lanes, q);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t d = c + i;
                // What min and max make of NaN is the processor's choice.
                const float value = lanes[i] >= -127.0f && lanes[i] <= 127.0f ? lanes[i] : 0.0f;
                out[d / 4 * 256 + d % 4] = static_cast<uint8_t>(128 + static_cast<int>(value));
            }
        }
        const float e = sum(lost), s = sum(left);
        if (!(e <= residual)) residual = e == e ? e : INFINITY;  // NaN counts as infinite
        if (s > norm) norm = s;
    }
    index.residual[b] = __builtin_sqrtf(residual);
    index.norm[b] = __builtin_sqrtf(norm);
}

// The mean of a complete block of rows, into out[b].
template <typename T>
inline void block_mean(const T* rows, int64_t stride, int64_t b, int64_t width, float* out) {
    for (int64_t c = 0; c < width; c += 16) {
        const int64_t n = width - c < 16 ? width - c : 16;
        F total = set1(0.0f);
        for (int64_t j = 0; j < kBlock; ++j) total = total + load_n(rows + (b * kBlock + j) * stride + c, n);
        store_n(out + b * width + c, total * set1(1.0f / kBlock), n);
    }
}

template <typename T>
void fill_index(const Problem& p, int64_t batch, int64_t kv_head, const HeadIndex& index, int64_t first,
                int64_t last) {
    const T* keys = head_of<T>(p.k, batch, kv_head);
    for (int64_t b = first; b < last; ++b) {
        const int64_t count = p.num_keys - b * kBlock < kBlock ? p.num_keys - b * kBlock : kBlock;
        quantise_block<T>(p, keys, index, b, count);
        if (index.key_mean == nullptr || count < kBlock) continue;
        block_mean(keys, p.k.token_stride, b, p.head_size, index.key_mean);
        block_mean(head_of<T>(p.v, batch, kv_head), p.v.token_stride, b, p.value_size, index.value_mean);
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
