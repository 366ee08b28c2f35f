// The number formats of inputs and outputs, and bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sparsek {

// IEEE half precision and bfloat16, as they lie in memory.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

static inline int32_t load_int32(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
static inline float to_float(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // zero or subnormal: fraction * 2^-24
        const float f = static_cast<float>(fraction) * 0x1p-24f;
        std::memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounded to nearest, ties to even.
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) {
        out->bits = static_cast<uint16_t>(bits >> 16 | 64);
        return;
    }
    out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_float(float x, Half* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) {
        out->bits = static_cast<uint16_t>(sign | 0x7e00);
    } else if (magnitude >= 65520.0f) {
        out->bits = static_cast<uint16_t>(sign | 0x7c00);
    } else if (magnitude < 0x1p-14f) {  // subnormal: adding a constant rounds at the right bit
        const float shifted = magnitude + 0.5f;
        std::memcpy(&bits, &shifted, sizeof bits);
        out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    } else {
        bits &= 0x7fffffffu;
        bits += 0xfff + (bits >> 13 & 1) - (112u << 23);
        out->bits = static_cast<uint16_t>(sign | bits >> 13);
    }
}

static inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }
static inline int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }
static inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
// The lowest n bits, 0 <= n <= 64.
static inline uint64_t first_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

}  // namespace sparsek
