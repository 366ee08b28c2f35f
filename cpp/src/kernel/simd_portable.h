// Vectors in plain C++, for any machine. The same interface as simd_avx512.h and simd_avx2.h.
#pragma once

#include "kernel/numbers.h"

namespace sparsek::portable {

// 16 floats.
struct F {
    float v[16];
};

template <typename Function>
inline F each(Function f) {
    F out;
    for (int i = 0; i < 16; ++i) out.v[i] = f(i);
    return out;
}

inline F set1(float x) {
    return each([&](int) { return x; });
}
template <typename T>
inline F load(const T* p) {
    return each([&](int i) { return to_float(p[i]); });
}
// The first n of 16, the others 0.
template <typename T>
inline F load_n(const T* p, int64_t n) {
    return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_n(float* p, F x, int64_t n) { std::memcpy(p, x.v, static_cast<size_t>(n) * sizeof(float)); }

inline F operator+(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F round(F x) {
    return each([&](int i) { return __builtin_rintf(x.v[i]); });
}
// 2^n for whole n from -126 to 127; NaN stays NaN.
inline F exp2_whole(F n) {
    return each([&](int i) {
        if (!(n.v[i] >= -126.0f && n.v[i] <= 127.0f)) return n.v[i] * 0.0f;
        const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    });
}
// value where x > limit, else 0.
inline F select_above(F x, float limit, F value) {
    return each([&](int i) { return x.v[i] > limit ? value.v[i] : 0.0f; });
}
inline F copy_sign(F magnitude, F sign) {
    return each([&](int i) { return __builtin_copysignf(magnitude.v[i], sign.v[i]); });
}
// x where bit i is 1, else value.
inline F keep_lanes(F x, uint32_t bits, float value) {
    return each([&](int i) { return bits >> i & 1 ? x.v[i] : value; });
}
inline float sum(F x) {
    for (int n = 8; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
    }
    return x.v[0];
}
inline float highest(F x) {
    for (int i = 1; i < 16; ++i) x.v[0] = x.v[i] > x.v[0] ? x.v[i] : x.v[0];
    return x.v[0];
}
// Lane j of x[i] and lane i of x[j] change places.
inline void transpose(F x[16]) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < i; ++j) {
            const float t = x[i].v[j];
            x[i].v[j] = x[j].v[i];
            x[j].v[i] = t;
        }
    }
}
// Lane i of the result is the sum of a[i].
inline F sums(const F a[16]) {
    return each([&](int i) { return sum(a[i]); });
}

// Elementwise maximum of `count` >= 1 blocks of 64 numbers, `stride` numbers apart.
inline void max_of_blocks(int16_t* out, const int16_t* x, int64_t stride, int64_t count) {
    std::memcpy(out, x, 64 * sizeof(int16_t));
    for (int64_t i = 1; i < count; ++i) {
        x += stride;
        for (int j = 0; j < 64; ++j) out[j] = x[j] > out[j] ? x[j] : out[j];
    }
}
// Bit i says whether x[i] >= threshold.
inline uint64_t at_least64(const int16_t* x, int16_t threshold) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(x[i] >= threshold) << i;
    return bits;
}
inline uint32_t at_least16(const int32_t* x, int32_t threshold) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] >= threshold) << i;
    return bits;
}
inline uint32_t at_least16(const float* x, float threshold) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] >= threshold) << i;
    return bits;
}
// Of 16 numbers those whose bits are set, moved together; returns how many. May write 16.
template <typename T>
inline int64_t compress16(T* out, const T* x, uint32_t bits) {
    int64_t n = 0;
    for (; bits != 0; bits &= bits - 1) out[n++] = x[lowest_bit(bits)];
    return n;
}
// x[i] becomes `value` where bit i is 0.
inline void keep64(int16_t* x, uint64_t bits, int16_t value) {
    for (int i = 0; i < 64; ++i) x[i] = bits >> i & 1 ? x[i] : value;
}
// Bit i says whether x[i] == value.
inline uint64_t equal64(const uint16_t* x, uint16_t value) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(x[i] == value) << i;
    return bits;
}
// Bit i says whether byte i is nonzero.
inline uint64_t nonzero64(const uint8_t* x) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(x[i] != 0) << i;
    return bits;
}

// ---- The scan: scores of 64 keys in 8 bits with some query rows. See simd_avx512.h.

inline constexpr float kQueryMax = 127.0f;
inline constexpr int kScanRows = 2;
inline constexpr int kDenseRows = 4, kDenseVectors = 1;

inline constexpr int slot_of(int j) { return j; }

inline void scan_block(const uint8_t* keys, const int8_t* queries, int64_t query_stride, const int32_t* start,
                       const int32_t* shift, int64_t channel_groups, int16_t* scores, int64_t stride) {
    for (int r = 0; r < kScanRows; ++r) {
        int32_t acc[64];
        for (int j = 0; j < 64; ++j) acc[j] = start[r];
        for (int64_t d = 0; d < channel_groups; ++d) {
            const int8_t* q = queries + r * query_stride + 4 * d;
            const uint8_t* k = keys + 256 * d;
            for (int j = 0; j < 64; ++j) {
                acc[j] += k[4 * j] * q[0] + k[4 * j + 1] * q[1] + k[4 * j + 2] * q[2] + k[4 * j + 3] * q[3];
            }
        }
        for (int j = 0; j < 64; ++j) scores[r * stride + j] = static_cast<int16_t>(acc[j] >> shift[r]);
    }
}

}  // namespace sparsek::portable
