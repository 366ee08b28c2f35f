// Vectors for AVX2 with FMA and F16C. The same interface as simd_avx512.h and simd_portable.h.
#pragma once

#include <immintrin.h>

#include "kernel/numbers.h"

namespace sparsek::avx2 {

// 16 floats, in two registers.
struct F {
    __m256 low, high;
};

inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F load(const Half* p) {
    const auto half = [](const Half* q) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    };
    return {half(p), half(p + 8)};
}
inline F load(const BFloat* p) {
    const auto half = [](const BFloat* q) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    };
    return {half(p), half(p + 8)};
}
// All ones in the first n of 16 lanes.
inline __m256i lanes_before(int64_t n, int first) {
    const __m256i lane =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
// The first n of 16, the others 0.
inline F load_n(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, lanes_before(n, 0)), _mm256_maskload_ps(p + 8, lanes_before(n, 8))};
}
template <typename T>
inline F load_n(const T* p, int64_t n) {
    if (n == 16) return load(p);
    T buffer[16] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return load(buffer);
}
inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline void store_n(float* p, F x, int64_t n) {
    _mm256_maskstore_ps(p, lanes_before(n, 0), x.low);
    _mm256_maskstore_ps(p + 8, lanes_before(n, 8), x.high);
}

inline F operator+(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
// 2^n for whole n from -126 to 127.
inline F exp2_whole(F n) {
    const auto half = [](__m256 x) {
        const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    return {half(n.low), half(n.high)};
}
// value where x > limit, else 0.
inline F select_above(F x, float limit, F value) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(x.low, l, _CMP_GT_OQ), value.low),
            _mm256_and_ps(_mm256_cmp_ps(x.high, l, _CMP_GT_OQ), value.high)};
}
inline F copy_sign(F magnitude, F sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(magnitude.low, _mm256_and_ps(sign.low, bit)),
            _mm256_or_ps(magnitude.high, _mm256_and_ps(sign.high, bit))};
}
// x where bit i is 1, else value.
inline F keep_lanes(F x, uint32_t bits, float value) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const auto half = [&](__m256 v, uint32_t b) {
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane_bit);
        return _mm256_blendv_ps(_mm256_set1_ps(value), v,
                                _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)));
    };
    return {half(x.low, bits & 255), half(x.high, bits >> 8)};
}
inline float sum(F x) {
    __m256 a = _mm256_add_ps(x.low, x.high);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float highest(F x) {
    __m256 a = _mm256_max_ps(x.low, x.high);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

// 8 x 8, in place.
inline void transpose8(__m256 x[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int h = 0; h < 2; ++h) {
            const __m256d low = _mm256_castps_pd(a[i + h]), high = _mm256_castps_pd(a[i + 2 + h]);
            b[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            b[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        x[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}
// Lane j of x[i] and lane i of x[j] change places.
inline void transpose(F x[16]) {
    __m256 quarter[4][8];
    for (int i = 0; i < 8; ++i) {
        quarter[0][i] = x[i].low;
        quarter[1][i] = x[i].high;
        quarter[2][i] = x[8 + i].low;
        quarter[3][i] = x[8 + i].high;
    }
    for (auto& q : quarter) transpose8(q);
    for (int i = 0; i < 8; ++i) {
        x[i] = {quarter[0][i], quarter[2][i]};
        x[8 + i] = {quarter[1][i], quarter[3][i]};
    }
}
// Lane i of the result is the sum of a[i].
inline F sums(const F a[16]) {
    const auto eight = [](const F* x) {
        __m256 b[4];
        for (int i = 0; i < 4; ++i) {
            b[i] = _mm256_hadd_ps(_mm256_add_ps(x[2 * i].low, x[2 * i].high),
                                  _mm256_add_ps(x[2 * i + 1].low, x[2 * i + 1].high));
        }
        const __m256 c = _mm256_hadd_ps(b[0], b[1]), d = _mm256_hadd_ps(b[2], b[3]);
        return _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
    };
    return {eight(a), eight(a + 8)};
}

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// Elementwise maximum of `count` >= 1 blocks of 64 numbers, `stride` numbers apart.
inline void max_of_blocks(int16_t* out, const int16_t* x, int64_t stride, int64_t count) {
    __m256i highest[4];
    for (int c = 0; c < 4; ++c) highest[c] = load_bytes(x + 16 * c);
    for (int64_t i = 1; i < count; ++i) {
        x += stride;
        for (int c = 0; c < 4; ++c) highest[c] = _mm256_max_epi16(highest[c], load_bytes(x + 16 * c));
    }
    for (int c = 0; c < 4; ++c) store_bytes(out + 16 * c, highest[c]);
}
// Bit i says whether x[i] >= threshold.
inline uint64_t at_least64(const int16_t* x, int16_t threshold) {
    const __m256i t = _mm256_set1_epi16(threshold);
    uint64_t below = 0;
    for (int i = 0; i < 64; i += 32) {
        const __m256i a = _mm256_cmpgt_epi16(t, load_bytes(x + i)),
                      b = _mm256_cmpgt_epi16(t, load_bytes(x + i + 16));
        // Packing to bytes works within halves: the permutation puts the quarters in order.
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
        below |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << i;
    }
    return ~below;
}
inline uint32_t at_least16(const int32_t* x, int32_t threshold) {
    const __m256i t = _mm256_set1_epi32(threshold);
    const auto below = [&](const int32_t* p) {
        return static_cast<uint32_t>(
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(t, load_bytes(p)))));
    };
    return ~(below(x) | below(x + 8) << 8) & 0xffff;
}
inline uint32_t at_least16(const float* x, float threshold) {
    const __m256 t = _mm256_set1_ps(threshold);
    const auto half = [&](const float* y) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(y), t, _CMP_GE_OQ)));
    };
    return half(x) | half(x + 8) << 8;
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
    const auto zeros = [](const uint8_t* p) {
        const __m256i zero = _mm256_cmpeq_epi8(load_bytes(p), _mm256_setzero_si256());
        return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zero)));
    };
    return ~(zeros(x) | zeros(x + 32) << 32);
}

// ---- The scan: scores of 64 keys in 8 bits with some query rows. See simd_avx512.h.

// Two products of unsigned and signed bytes are added in 16 bits, with saturation: 2 * 255 * 63 still fits,
// and 2 * 255 * 127 would not. So queries have 7 bits here.
inline constexpr float kQueryMax = 63.0f;
inline constexpr int kScanRows = 3;
inline constexpr int kDenseRows = 6, kDenseVectors = 1;

inline constexpr int slot_of(int j) {
    // Groups of 16 keys in two vectors A and B: packing gives A0-3 B0-3 A4-7 B4-7.
    return (j / 16 * 2 + (j % 8 >= 4)) * 8 + j % 16 / 8 * 4 + j % 4;
}

inline void scan_block(const uint8_t* keys, const int8_t* queries, int64_t query_stride, const int32_t* start,
                       const int32_t* shift, int64_t channel_groups, int16_t* scores, int64_t stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half, keys += 128) {
        __m256i acc[kScanRows][4];
        for (int r = 0; r < kScanRows; ++r) {
            for (int c = 0; c < 4; ++c) acc[r][c] = _mm256_set1_epi32(start[r]);
        }
        for (int64_t d = 0; d < channel_groups; ++d) {
            const uint8_t* k = keys + 256 * d;
#pragma GCC unroll 4
            for (int r = 0; r < kScanRows; ++r) {
                const __m256i q = _mm256_set1_epi32(load_int32(queries + r * query_stride + 4 * d));
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    const __m256i pairs = _mm256_maddubs_epi16(load_bytes(k + 32 * c), q);
                    acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int r = 0; r < kScanRows; ++r) {
            const __m128i s = _mm_cvtsi32_si128(shift[r]);
            int16_t* out = scores + r * stride + 32 * half;
            for (int c = 0; c < 4; c += 2) {
                store_bytes(out + 8 * c, _mm256_packs_epi32(_mm256_sra_epi32(acc[r][c], s),
                                                            _mm256_sra_epi32(acc[r][c + 1], s)));
            }
        }
    }
}

}  // namespace sparsek::avx2
