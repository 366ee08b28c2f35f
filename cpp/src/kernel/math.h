// Dot products, exp and tanh on vectors; the same source for every instruction set.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

// e^x for x <= 0, and 0 for -inf; relative error below 2e-7. Cody-Waite reduction, Cephes' polynomial.
inline F exp(F x) {
    const F clamped = max(x, set1(-87.3f));
    const F n = round(clamped * set1(1.44269504f));
    F f = fma(n, set1(-0.693359375f), clamped);
    f = fma(n, set1(2.12194440e-4f), f);
    F p = set1(1.9875691500e-4f);
    p = fma(p, f, set1(1.3981999507e-3f));
    p = fma(p, f, set1(8.3334519073e-3f));
    p = fma(p, f, set1(4.1665795894e-2f));
    p = fma(p, f, set1(1.6666665459e-1f));
    p = fma(p, f, set1(5.0000001201e-1f));
    p = fma(p, f * f, f + set1(1.0f));
    return select_above(x, -87.3f, p * exp2_whole(n));
}

// softcap * tanh(x / softcap).
inline F capped(F x, float softcap) {
    const F y = max(min(x * set1(2.0f / softcap), set1(60.0f)), set1(-60.0f));
    // tanh(y/2) = (1 - e^-y) / (1 + e^-y), with e^-|y| so that nothing overflows.
    const F e = exp(min(y, set1(0.0f) - y));
    const F t = (set1(1.0f) - e) / (set1(1.0f) + e);
    return copy_sign(t, y) * set1(softcap);
}
inline float capped(float x, float softcap) {
    return softcap > 0 ? softcap * __builtin_tanhf(x / softcap) : x;
}

template <typename T, int kSize>
inline F dots_fixed(const float* q, const T* const* rows, int64_t size) {
    const int64_t n = kSize > 0 ? kSize : size;
    F acc[16];
    for (int i = 0; i < 16; ++i) acc[i] = set1(0.0f);
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
        const F x = load(q + c);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) acc[i] = fma(x, load(rows[i] + c), acc[i]);
    }
    if (c < n) {
        const F x = load(q + c);
        for (int i = 0; i < 16; ++i) acc[i] = fma(x, load_n(rows[i] + c, n - c), acc[i]);
    }
    return sums(acc);
}

// Lane i: q . rows[i]. q is padded with zeros to a multiple of 16.
template <typename T>
inline F dots(const float* q, const T* const* rows, int64_t size) {
    if (size == 64) return dots_fixed<T, 64>(q, rows, size);
    if (size == 128) return dots_fixed<T, 128>(q, rows, size);
    return dots_fixed<T, 0>(q, rows, size);
}

// out[0 .. 16 kVectors) += sum_i weight[i] * row_i, the rows at `at(i)`; the last vector has `tail` lanes.
template <typename T, int kVectors, typename RowAt>
inline void add_weighted_chunk(const float* weight, int64_t count, RowAt at, int64_t tail, float* out) {
    F even[kVectors], odd[kVectors];
    for (int c = 0; c < kVectors; ++c) even[c] = load(out + 16 * c), odd[c] = set1(0.0f);
    const auto add = [&](F* acc, int64_t i) {
        const F w = set1(weight[i]);
        const T* row = at(i);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors - 1; ++c) acc[c] = fma(w, load(row + 16 * c), acc[c]);
        const T* last = row + 16 * (kVectors - 1);
        acc[kVectors - 1] = fma(w, tail == 16 ? load(last) : load_n(last, tail), acc[kVectors - 1]);
    };
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
        add(even, i);
        add(odd, i + 1);
    }
    if (i < count) add(even, i);
    for (int c = 0; c < kVectors; ++c) store(out + 16 * c, even[c] + odd[c]);
}

// out += sum_i weight[i] * row_i over rows of `size` numbers; out is padded to a multiple of 16.
template <typename T, typename RowAt>
inline void add_weighted(const float* weight, int64_t count, RowAt at, int64_t size, float* out) {
    for (int64_t c = 0; c < size; c += 64) {
        const auto chunk_at = [&](int64_t i) { return at(i) + c; };
        const int64_t left = size - c, tail = left % 16 == 0 ? 16 : left % 16;
        if (left > 48) {
            add_weighted_chunk<T, 4>(weight, count, chunk_at, left >= 64 ? 16 : tail, out + c);
        } else if (left > 32) {
            add_weighted_chunk<T, 3>(weight, count, chunk_at, tail, out + c);
        } else if (left > 16) {
            add_weighted_chunk<T, 2>(weight, count, chunk_at, tail, out + c);
        } else {
            add_weighted_chunk<T, 1>(weight, count, chunk_at, tail, out + c);
        }
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
