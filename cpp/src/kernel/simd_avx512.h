// Vectors for AVX-512 with VNNI. The same interface as simd_avx2.h and simd_portable.h.
#pragma once

#include <immintrin.h>

#include "kernel/numbers.h"

namespace sparsek::avx512_vnni {

// 16 floats.
struct F {
    __m512 v;
};

inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F load(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
// The first n of 16, the others 0.
inline F load_n(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
template <typename T>
inline F load_n(const T* p, int64_t n) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    T buffer[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
    return load(buffer);
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline void store_n(float* p, F x, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
}

inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F round(F x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n.
inline F exp2_whole(F n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
// value where x > limit, else 0.
inline F select_above(F x, float limit, F value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GT_OQ), value.v)};
}
inline F copy_sign(F magnitude, F sign) {
    const __m512i s = _mm512_and_si512(_mm512_castps_si512(sign.v), _mm512_set1_epi32(INT32_MIN));
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude.v), s))};
}
inline float sum(F x) { return _mm512_reduce_add_ps(x.v); }
inline float highest(F x) { return _mm512_reduce_max_ps(x.v); }

// x where bit i is 1, else value.
inline F keep_lanes(F x, uint32_t bits, float value) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(value), static_cast<__mmask16>(bits), x.v)};
}
// Lane j of x[i] and lane i of x[j] change places.
inline void transpose(F x[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int h = 0; h < 2; ++h) {
            const __m512d low = _mm512_castps_pd(a[i + h]), high = _mm512_castps_pd(a[i + 2 + h]);
            b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 even = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        x[i].v = _mm512_shuffle_f32x4(even, even2, 0x88);
        x[8 + i].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[4 + i].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        x[12 + i].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

// Lane i of the result is the sum of a[i].
inline F sums(const F a[16]) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; ++i) {
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                             _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i) {
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    }
    return {_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd))};
}

// Elementwise maximum of `count` >= 1 blocks of 64 numbers, `stride` numbers apart.
inline void max_of_blocks(int16_t* out, const int16_t* x, int64_t stride, int64_t count) {
    __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 32);
    for (int64_t i = 1; i < count; ++i) {
        x += stride;
        low = _mm512_max_epi16(low, _mm512_loadu_si512(x));
        high = _mm512_max_epi16(high, _mm512_loadu_si512(x + 32));
    }
    _mm512_storeu_si512(out, low);
    _mm512_storeu_si512(out + 32, high);
}
// Bit i says whether x[i] >= threshold.
inline uint64_t at_least64(const int16_t* x, int16_t threshold) {
    const __m512i t = _mm512_set1_epi16(threshold);
    const uint64_t low = _mm512_cmpge_epi16_mask(_mm512_loadu_si512(x), t);
    const uint64_t high = _mm512_cmpge_epi16_mask(_mm512_loadu_si512(x + 32), t);
    return low | high << 32;
}
inline uint32_t at_least16(const int32_t* x, int32_t threshold) {
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(x), _mm512_set1_epi32(threshold));
}
inline uint32_t at_least16(const float* x, float threshold) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(threshold), _CMP_GE_OQ);
}
// Of 16 numbers those whose bits are set, moved together; returns how many. Writes 16.
template <typename T>
inline int64_t compress16(T* out, const T* x, uint32_t bits) {
    static_assert(sizeof(T) == 4);
    _mm512_storeu_si512(out,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(x)));
    return count_bits(bits);
}
// x[i] becomes `value` where bit i is 0.
inline void keep64(int16_t* x, uint64_t bits, int16_t value) {
    const __m512i v = _mm512_set1_epi16(value);
    for (int i = 0; i < 64; i += 32) {
        const auto m = static_cast<__mmask32>(bits >> i);
        _mm512_storeu_si512(x + i, _mm512_mask_loadu_epi16(v, m, x + i));
    }
}
// Bit i says whether x[i] == value.
inline uint64_t equal64(const uint16_t* x, uint16_t value) {
    const __m512i v = _mm512_set1_epi16(static_cast<int16_t>(value));
    // As numbers at once: from masks put together GCC 12 loses bits with -fsanitize=thread.
    const uint32_t low = _cvtmask32_u32(_mm512_cmpeq_epi16_mask(_mm512_loadu_si512(x), v));
    const uint32_t high = _cvtmask32_u32(_mm512_cmpeq_epi16_mask(_mm512_loadu_si512(x + 32), v));
    return low | static_cast<uint64_t>(high) << 32;
}
// Bit i says whether byte i is nonzero.
inline uint64_t nonzero64(const uint8_t* x) {
    const __m512i v = _mm512_loadu_si512(x);
    return _mm512_test_epi8_mask(v, v);
}

// ---- The scan: scores of 64 keys in 8 bits with some query rows.

inline constexpr float kQueryMax = 127.0f;  // largest quantised query channel
inline constexpr int kScanRows = 6;         // rows that fit into the registers
inline constexpr int kDenseRows = 6, kDenseVectors = 4;

// Where key j of a block stands, so that packing to 16 bits puts the scores in order.
inline constexpr int slot_of(int j) { return (j / 32 * 2 + (j % 8 >= 4)) * 16 + j % 32 / 8 * 4 + j % 4; }

// sum += products of bytes, unsigned by signed, four to a lane. In assembly: of the intrinsic GCC 12 keeps a
// copy of every sum in memory.
inline void add_products(__m512i& sum, __m512i keys, __m512i query) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(query));
}

// scores[row * stride + j] = (sum_d key_jd * query_rowd) >> shift[row], with the offset of the keys, which is
// in `start`, taken off. The sums are named, one by one, for the same reason.
inline void scan_block(const uint8_t* keys, const int8_t* queries, int64_t query_stride, const int32_t* start,
                       const int32_t* shift, int64_t channel_groups, int16_t* scores, int64_t stride) {
    static_assert(kScanRows == 6);
    __m512i a0 = _mm512_set1_epi32(start[0]), b0 = a0, c0 = a0, d0 = a0;
    __m512i a1 = _mm512_set1_epi32(start[1]), b1 = a1, c1 = a1, d1 = a1;
    __m512i a2 = _mm512_set1_epi32(start[2]), b2 = a2, c2 = a2, d2 = a2;
    __m512i a3 = _mm512_set1_epi32(start[3]), b3 = a3, c3 = a3, d3 = a3;
    __m512i a4 = _mm512_set1_epi32(start[4]), b4 = a4, c4 = a4, d4 = a4;
    __m512i a5 = _mm512_set1_epi32(start[5]), b5 = a5, c5 = a5, d5 = a5;
    for (int64_t g = 0; g < channel_groups; ++g, keys += 256, queries += 4) {
        const __m512i k0 = _mm512_loadu_si512(keys), k1 = _mm512_loadu_si512(keys + 64);
        const __m512i k2 = _mm512_loadu_si512(keys + 128), k3 = _mm512_loadu_si512(keys + 192);
        const auto add_row = [&](int64_t row, __m512i& a, __m512i& b, __m512i& c, __m512i& d) {
            const __m512i q = _mm512_set1_epi32(load_int32(queries + row * query_stride));
            add_products(a, k0, q);
            add_products(b, k1, q);
            add_products(c, k2, q);
            add_products(d, k3, q);
        };
        add_row(0, a0, b0, c0, d0);
        add_row(1, a1, b1, c1, d1);
        add_row(2, a2, b2, c2, d2);
        add_row(3, a3, b3, c3, d3);
        add_row(4, a4, b4, c4, d4);
        add_row(5, a5, b5, c5, d5);
    }
    const auto store_row = [&](int64_t row, __m512i a, __m512i b, __m512i c, __m512i d) {
        const __m128i s = _mm_cvtsi32_si128(shift[row]);
        int16_t* out = scores + row * stride;
        _mm512_storeu_si512(out, _mm512_packs_epi32(_mm512_sra_epi32(a, s), _mm512_sra_epi32(b, s)));
        _mm512_storeu_si512(out + 32, _mm512_packs_epi32(_mm512_sra_epi32(c, s), _mm512_sra_epi32(d, s)));
    };
    store_row(0, a0, b0, c0, d0);
    store_row(1, a1, b1, c1, d1);
    store_row(2, a2, b2, c2, d2);
    store_row(3, a3, b3, c3, d3);
    store_row(4, a4, b4, c4, d4);
    store_row(5, a5, b5, c5, d5);
}

}  // namespace sparsek::avx512_vnni
