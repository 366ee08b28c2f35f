// Random problems, each solved by every instruction set of this machine, with and without a key index and on
// one and three threads: all must keep the same keys and give the same output.
//
// With clang, -fsanitize=fuzzer makes it a libFuzzer target (compile with -DSPARSEK_LIBFUZZER). Otherwise it
// has a main() of its own: `fuzz_attention [how many] [first seed]`.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "sparsek/attention.h"
#include "sparsek/key_index.h"

using namespace sparsek;

namespace {

// Takes numbers from the fuzzer's bytes; zeros when they are used up.
class Bytes {
   public:
    Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
    int64_t up_to(int64_t last) {
        int64_t x = 0;
        for (int i = 0; i < 2 && left_ > 0; ++i, --left_) x = x << 8 | *data_++;
        return x % (last + 1);
    }

   private:
    const uint8_t* data_;
    size_t left_;
};

// A problem over small whole numbers: sums of their products are exact, so every way to compute the scores
// gives the same ones, ties included.
struct Case {
    Problem p;
    std::vector<float> floats[3];
    std::vector<uint16_t> halves[3];
    std::vector<uint8_t> mask;
    std::vector<uint16_t> numbers;  // of a mask that adds them
    std::vector<float> slopes, sinks;
    int64_t width = 0;

    explicit Case(Bytes bytes) {
        p.batch = bytes.up_to(2);
        p.kv_heads = 1 + bytes.up_to(2);
        p.heads = p.kv_heads * (1 + bytes.up_to(4));
        p.num_queries = bytes.up_to(bytes.up_to(1) ? 40 : 4);
        p.num_keys = 1 + bytes.up_to(bytes.up_to(1) ? 700 : 70);
        p.head_size = 1 + bytes.up_to(140);
        p.value_size = 1 + bytes.up_to(140);
        p.dtype = p.query_dtype = static_cast<DType>(bytes.up_to(2));
        p.is_causal = bytes.up_to(1) != 0;
        p.first_position = p.num_keys - p.num_queries;
        p.scale = bytes.up_to(3) ? 0.125f : 0.0f;
        p.softcap = bytes.up_to(2) ? 0.0f : 8.0f;
        p.rule.top_k = bytes.up_to(bytes.up_to(1) ? 20 : p.num_keys);
        p.rule.sinks = bytes.up_to(5);
        p.rule.window = bytes.up_to(1) ? 0 : bytes.up_to(100);
        p.rule.stride = bytes.up_to(2) ? 0 : bytes.up_to(9);
        p.rule.centroid_tail = bytes.up_to(1) != 0;
        // Of no whole number of keys: equal scores would have just that share.
        p.rule.min_share = bytes.up_to(1) ? 0.0f : 1.0f / (1.37f + static_cast<float>(bytes.up_to(1000)));
        const int64_t largest = bytes.up_to(1) ? 3 : 0;  // 0: everything ties
        const int64_t outlier = bytes.up_to(3) ? 0 : 50;
        std::mt19937 random(static_cast<uint32_t>(bytes.up_to(65535)));
        const auto number = [&] {
            const auto range = static_cast<uint32_t>(2 * largest + 1);
            return static_cast<float>(static_cast<int64_t>(random() % range) - largest);
        };
        Tensor* tensors[3] = {&p.q, &p.k, &p.v};
        const int64_t heads[3] = {p.heads, p.kv_heads, p.kv_heads};
        const int64_t tokens[3] = {p.num_queries, p.num_keys, p.num_keys};
        const int64_t sizes[3] = {p.head_size, p.head_size, p.value_size};
        const int64_t gap = bytes.up_to(3);  // between the rows
        for (int i = 0; i < 3; ++i) {
            const int64_t stride = sizes[i] + gap;
            floats[i].resize(static_cast<size_t>(p.batch * heads[i] * tokens[i] * stride));
            for (float& x : floats[i]) x = number();
            if (i == 1 && outlier != 0 && !floats[i].empty()) floats[i][floats[i].size() / 2] = 50.0f;
            for (const float x : floats[i]) halves[i].push_back(to_half(x));
            const void* data = p.dtype == DType::f32 ? static_cast<const void*>(floats[i].data())
                                                     : static_cast<const void*>(halves[i].data());
            *tensors[i] = {data, heads[i] * tokens[i] * stride, tokens[i] * stride, stride};
        }
        if (bytes.up_to(1)) {
            mask.resize(static_cast<size_t>(p.num_queries * p.num_keys));
            const auto chance = static_cast<uint32_t>(bytes.up_to(10));
            for (uint8_t& m : mask) m = random() % 10 < chance;
            p.mask = {mask.data(), Mask::Form::bytes, 0, 0, p.num_keys, 1};
            if (mask.empty()) p.mask.data = nullptr;
        }
        width = p.num_keys;
        if (bytes.up_to(2) == 0) {
            const bool per_head = bytes.up_to(1) != 0;
            numbers.resize(static_cast<size_t>((per_head ? p.heads : 1) * p.num_queries * p.num_keys));
            constexpr uint16_t kNumbers[] = {0, 0xbc00, 0xc000, 0xfc00, 0x3c00, 0};  // -1, -2, -inf, 1
            const auto kinds = static_cast<uint32_t>(1 + bytes.up_to(5));
            for (uint16_t& x : numbers) x = kNumbers[random() % kinds];
            const int64_t head = p.num_queries * p.num_keys;
            p.mask = {numbers.data(), Mask::Form::halves, 0, per_head ? head : 0, p.num_keys, 1};
            if (numbers.empty()) p.mask.data = nullptr;
            for (int64_t h = 0; h < p.heads; ++h) slopes.push_back(h % 2 ? 0.25f : 2.0f);
            if (bytes.up_to(1)) p.slopes = slopes.data();
            if (p.rule.wants_means()) p.softcap = 0.0f;
        }
        for (int64_t h = 0; h < p.heads; ++h) sinks.push_back(static_cast<float>(h % 3) - 1.0f);
        if (bytes.up_to(3) == 0) p.sink_logits = sinks.data();
    }

    // Small whole numbers in half precision or in bfloat16, without rounding.
    uint16_t to_half(float x) const {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (p.dtype == DType::bf16) return static_cast<uint16_t>(bits >> 16);
        if (x == 0.0f) return 0;
        const uint32_t exponent = (bits >> 23 & 255) - 112;
        return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(exponent << 10) |
               static_cast<uint16_t>(bits >> 13 & 1023);
    }
};

struct Result {
    std::vector<uint8_t> out;
    std::vector<int32_t> indices, counts;
};

Result solve(const Case& c, Isa isa, int threads, KeyIndex* index) {
    const Problem& p = c.p;
    const auto rows = static_cast<size_t>(p.batch * p.heads * p.num_queries);
    const size_t bytes = p.dtype == DType::f32 ? 4 : 2;
    Result r;
    r.out.assign(rows * static_cast<size_t>(p.value_size) * bytes, 0xee);
    r.indices.assign(rows * static_cast<size_t>(c.width), -2);
    r.counts.assign(rows, -2);
    const Options options = {threads, isa};
    const Output out = {r.out.data(), p.heads * p.num_queries * p.value_size, p.num_queries * p.value_size,
                        p.value_size};
    CHECK(attention(p, options, out, index) == Status::done);
    CHECK(select(p, options, c.width, r.indices.data(), r.counts.data()) == Status::done);
    return r;
}

float number_at(const Result& r, DType dtype, size_t i) {
    if (dtype == DType::f32) {
        float x;
        std::memcpy(&x, r.out.data() + 4 * i, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, r.out.data() + 2 * i, 2);
    if (dtype == DType::bf16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    const float magnitude =
        (half >> 10 & 31) == 0 ? std::ldexp(static_cast<float>(half & 1023), -24)
                               : std::ldexp(static_cast<float>(1024 + (half & 1023)), (half >> 10 & 31) - 25);
    return half >> 15 ? -magnitude : magnitude;
}

void check_same(const Case& c, const Result& a, const Result& b) {
    CHECK(a.counts == b.counts);
    CHECK(a.indices == b.indices);
    const float unit = c.p.dtype == DType::f32 ? 1e-5f : c.p.dtype == DType::f16 ? 4e-3f : 3e-2f;
    const size_t count = a.counts.size() * static_cast<size_t>(c.p.value_size);
    for (size_t i = 0; i < count; ++i) {
        const float x = number_at(a, c.p.dtype, i), y = number_at(b, c.p.dtype, i);
        CHECK(std::fabs(x - y) <= unit * std::max(1.0f, std::fabs(x)));
    }
}

void try_bytes(const uint8_t* data, size_t size) {
    const Case c(Bytes(data, size));
    const Result expected = solve(c, Isa::portable, 1, nullptr);
    for (const Isa isa : available_isas(detect())) {
        const Result alone = solve(c, isa, 1, nullptr);
        check_same(c, alone, expected);
        CHECK(solve(c, isa, 3, nullptr).out == alone.out);

        // An index that grew in two steps and was cropped in between.
        KeyIndex index(c.p, true, isa);
        Problem shorter = c.p;
        shorter.num_keys = 1 + c.p.num_keys / 2;
        const Options options = {2, isa};
        CHECK(index.extend(shorter, options));
        index.truncate(c.p.num_keys / 3);
        check_same(c, solve(c, isa, 3, &index), expected);
        CHECK(c.p.rule.keeps_all(c.p.num_keys) || !c.numbers.empty() || c.p.batch * c.p.num_queries == 0 ||
              index.length() == c.p.num_keys);
    }
}

}  // namespace

#if defined(SPARSEK_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try_bytes(data, size);
    if (failures > 0) std::abort();
    return 0;
}
#else
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__x86_64__)
constexpr long kDefaultCount = 60;  // with sanitizers or in an emulator each takes ten times as long
#else
constexpr long kDefaultCount = 500;
#endif

int main(int argc, char** argv) {
    const long count = argc > 1 ? std::atol(argv[1]) : kDefaultCount,
               first = argc > 2 ? std::atol(argv[2]) : 0;
    for (long seed = first; seed < first + count; ++seed) {
        std::mt19937 random(static_cast<uint32_t>(seed));
        std::vector<uint8_t> bytes(96);
        for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
        try_bytes(bytes.data(), bytes.size());
        if (failures > 0) {
            std::fprintf(stderr, "the problem of seed %ld\n", seed);
            return 1;
        }
    }
    return 0;
}
#endif
