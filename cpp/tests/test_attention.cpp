#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "sparsek/attention.h"
#include "sparsek/key_index.h"
#include "sparsek/packed_mask.h"
#include "sparsek/value_means.h"

using namespace sparsek;

namespace {

constexpr int64_t kHeads = 2, kQueries = 200, kKeys = 400, kSize = 32;

struct Inputs {
    std::vector<float> q, k, v;
    Problem p;

    explicit Inputs(int64_t top_k) {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        for (auto* x : {&q, &k, &v}) {
            x->resize(kHeads * kKeys * kSize);
            for (float& f : *x) f = normal(random);
        }
        p.batch = 1;
        p.heads = p.kv_heads = kHeads;
        p.num_queries = kQueries;
        p.num_keys = kKeys;
        p.head_size = p.value_size = kSize;
        p.q = {q.data(), 0, kKeys * kSize, kSize};
        p.k = {k.data(), 0, kKeys * kSize, kSize};
        p.v = {v.data(), 0, kKeys * kSize, kSize};
        p.is_causal = true;
        p.first_position = kKeys - kQueries;
        p.scale = 0.2f;
        p.rule = {top_k, 4, 16, 0, true};
    }
};

Output output_of(const Problem& p, float* out) {
    return {out, p.heads * p.num_queries * p.value_size, p.num_queries * p.value_size, p.value_size};
}

std::vector<float> solve(const Problem& p, const Options& options, KeyIndex* index = nullptr) {
    std::vector<float> out(static_cast<size_t>(p.heads * p.num_queries * p.value_size));
    CHECK(attention(p, options, output_of(p, out.data()), index) == Status::done);
    return out;
}

// Rows that keep everything, by the definition.
void dense_is_softmax() {
    const Inputs in(kKeys);
    for (const Isa isa : available_isas(detect())) {
        const auto out = solve(in.p, {2, isa});
        double worst = 0;
        for (int64_t h = 0; h < kHeads; ++h) {
            for (int64_t i = 0; i < kQueries; ++i) {
                std::vector<double> sums(kSize);
                double total = 0;
                for (int64_t j = 0; j <= in.p.first_position + i; ++j) {
                    double score = 0;
                    for (int64_t d = 0; d < kSize; ++d) {
                        const auto at = [&](const std::vector<float>& x, int64_t row) {
                            return static_cast<double>(x[static_cast<size_t>((h * kKeys + row) * kSize + d)]);
                        };
                        score += at(in.q, i) * at(in.k, j);
                    }
                    const double weight = std::exp(score * static_cast<double>(in.p.scale));
                    total += weight;
                    for (int64_t d = 0; d < kSize; ++d)
                        sums[static_cast<size_t>(d)] +=
                            weight *
                            static_cast<double>(in.v[static_cast<size_t>((h * kKeys + j) * kSize + d)]);
                }
                for (int64_t d = 0; d < kSize; ++d) {
                    const auto got =
                        static_cast<double>(out[static_cast<size_t>((h * kQueries + i) * kSize + d)]);
                    worst = std::max(worst, std::fabs(got - sums[static_cast<size_t>(d)] / total));
                }
            }
        }
        CHECK(worst < 1e-5);
    }
}

void callers_on_several_threads_do_not_meet() {
    const Inputs in(20);
    for (const Isa isa : available_isas(detect())) {
        const auto expected = solve(in.p, {1, isa});
        std::atomic<int> wrong{0};
        std::vector<std::thread> callers;
        for (int t = 0; t < 3; ++t) {
            callers.emplace_back([&] {
                KeyIndex index(in.p, true, isa);
                for (int i = 0; i < 5; ++i) {
                    std::vector<float> out(expected.size());
                    attention(in.p, {3, isa}, output_of(in.p, out.data()), i % 2 ? &index : nullptr);
                    if (out != expected) ++wrong;
                }
            });
        }
        for (std::thread& t : callers) t.join();
        CHECK(wrong == 0);
    }
}

void interrupted_calls_end_early_and_leave_the_index_usable() {
    const Inputs in(20);
    const auto expected = solve(in.p, {1, Isa::portable});
    int asked = 0;
    const auto at_once = [](void* count) { return ++*static_cast<int*>(count) > 1; };
    const Options options = {1, Isa::portable, at_once, &asked};
    std::vector<float> out(expected.size());
    KeyIndex index(in.p, true, Isa::portable);
    CHECK(attention(in.p, options, output_of(in.p, out.data()), &index) == Status::interrupted);
    CHECK(asked == 2);
    CHECK(solve(in.p, {1, Isa::portable}, &index) == expected);
}

void reordered_index_follows_its_batch() {
    Inputs in(20);
    in.p.batch = 2;  // the heads become two sequences of one head each
    in.p.heads = in.p.kv_heads = 1;
    for (Tensor* x : {&in.p.q, &in.p.k, &in.p.v}) x->batch_stride = kKeys * kSize;
    KeyIndex index(in.p, true, Isa::portable);
    std::vector<float> out(kHeads * kQueries * kSize);
    CHECK(attention(in.p, {1, Isa::portable}, output_of(in.p, out.data()), &index) == Status::done);
    const int64_t second_twice[] = {1, 1, 1};
    index.reorder(second_twice, 3);
    CHECK(index.batch() == 3 && index.length() == kKeys);
    in.p.batch = 3;
    for (Tensor* x : {&in.p.q, &in.p.k, &in.p.v}) {
        x->data = static_cast<const float*>(x->data) + kKeys * kSize;
        x->batch_stride = 0;
    }
    std::vector<float> thrice(3 * kQueries * kSize);
    CHECK(attention(in.p, {1, Isa::portable}, output_of(in.p, thrice.data()), &index) == Status::done);
    for (size_t i = 0; i < thrice.size(); ++i)
        CHECK(thrice[i] == out[kQueries * kSize + i % (kQueries * kSize)]);
}

// As llama.cpp has it: keys and values in half precision, queries and output in single, the output token by
// token, and an additive mask of halves.
void mixed_formats_and_a_mask_of_halves() {
    Inputs in(20);
    std::vector<uint16_t> half[2], mask(kQueries * kKeys);
    for (const auto& [to, from] : {std::pair{&half[0], &in.k}, std::pair{&half[1], &in.v}}) {
        for (float& x : *from) {
            x = std::nearbyint(x * 8) / 8;  // whole eighths: the upper half of their bits is all of them
            uint32_t bits;
            std::memcpy(&bits, &x, sizeof bits);
            to->push_back(static_cast<uint16_t>(bits >> 16));
        }
    }
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 == 0 ? 0xfc00 : 0;
    std::vector<uint8_t> allowed(mask.size());
    for (size_t i = 0; i < mask.size(); ++i) allowed[i] = mask[i] == 0;
    for (const Isa isa : available_isas(detect())) {
        Problem p = in.p;
        p.mask = {allowed.data(), Mask::Form::bytes, 0, 0, kKeys, 1};
        const auto expected = solve(p, {1, isa});
        p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
        p.dtype = DType::bf16;
        p.k.data = half[0].data();
        p.v.data = half[1].data();
        std::vector<float> out(expected.size());
        CHECK(attention(p, {2, isa}, {out.data(), 0, kSize, kHeads * kSize}) == Status::done);
        for (int64_t h = 0; h < kHeads; ++h) {
            for (int64_t i = 0; i < kQueries * kSize; ++i) {
                const int64_t token = i / kSize, d = i % kSize;
                CHECK(std::fabs(out[static_cast<size_t>((token * kHeads + h) * kSize + d)] -
                                expected[static_cast<size_t>(h * kQueries * kSize + i)]) < 1e-6f);
            }
        }
        for (const uint16_t bad : std::initializer_list<uint16_t>{0x7c00, 0x7e00, 0xfe00}) {  // infinity, NaN
            mask[5] = bad;
            CHECK(attention(p, {2, isa}, {out.data(), 0, kSize, kHeads * kSize}) == Status::bad_mask);
        }
        mask[5] = 0;
    }
}

// A mask in bits gives what the mask gives, and knows the row that may see most.
void packed_masks_are_the_mask() {
    for (const Isa isa : available_isas(detect())) {
        const Inputs in(20);
        Problem p = in.p;
        p.is_causal = false;
        std::vector<uint16_t> mask(kQueries * kKeys, 0xfc00);
        for (int64_t i = 0; i < kQueries; ++i) {  // row i sees i % 130 + 1 keys
            for (int64_t j = 0; j <= i % 130; ++j) mask[static_cast<size_t>(i * kKeys + 2 * j + i % 2)] = 0;
        }
        p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
        const auto expected = solve(p, {2, isa});
        PackedMask packed;
        CHECK(packed.pack(p, {2, isa}) == Status::done);
        CHECK(packed.most_allowed() == 130);
        packed.put_into(&p);
        CHECK(p.bias.data == nullptr);
        CHECK(solve(p, {2, isa}) == expected);
        p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
        mask[7] = 0x3c00;
        CHECK(packed.pack(p, {2, isa}) == Status::done);
        const auto added = solve(p, {2, isa});
        packed.put_into(&p);
        CHECK(p.bias.data == mask.data());
        CHECK(solve(p, {2, isa}) == added);
        p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
        mask[7] = 0x7e00;  // NaN
        CHECK(packed.pack(p, {2, isa}) == Status::bad_mask);
    }
}

// ALiBi, and the attention sinks of the model: every row by the definition, over the keys that it keeps,
// which are the best.
void numbers_of_a_mask_are_added(int64_t top_k, float softcap) {
    Inputs in(top_k);
    in.p.rule.centroid_tail = false;
    constexpr std::pair<uint16_t, double> kNumbers[] = {{0, 0.0},           {0x8000, 0.0}, {0xb800, -0.5},
                                                        {0xc000, -2.0},     {0x3e00, 1.5}, {0xc900, -10.0},
                                                        {0xfc00, -INFINITY}};
    std::mt19937 random(2);
    std::vector<uint16_t> mask(kQueries * kKeys);
    std::vector<double> numbers(mask.size());
    for (size_t i = 0; i < mask.size(); ++i) std::tie(mask[i], numbers[i]) = kNumbers[random() % 7];
    for (size_t i = 0; i < kKeys; ++i) mask[3 * kKeys + i] = 0xfc00;  // a row that sees nothing
    const float slopes[kHeads] = {0.5f, 2.0f}, sinks[kHeads] = {2.0f, -1.0f};
    Problem p = in.p;
    p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
    p.softcap = softcap;
    p.slopes = slopes;
    p.sink_logits = sinks;
    for (const Isa isa : available_isas(detect())) {
        const auto out = solve(p, {2, isa});
        std::vector<int32_t> indices(kHeads * kQueries * kKeys), counts(kHeads * kQueries);
        CHECK(select(p, {2, isa}, kKeys, indices.data(), counts.data()) == Status::done);
        for (int64_t row = 0; row < kHeads * kQueries; ++row) {
            const int64_t h = row / kQueries, i = row % kQueries, position = p.first_position + i;
            std::vector<bool> kept(kKeys);
            for (int64_t n = 0; n < counts[static_cast<size_t>(row)]; ++n)
                kept[static_cast<size_t>(indices[static_cast<size_t>(row * kKeys + n)])] = true;
            double total = std::exp(static_cast<double>(sinks[h])), worst_kept = INFINITY,
                   best_left = -INFINITY;
            int64_t chosen = 0, left = 0, seen = 0;
            std::vector<double> sums(kSize);
            for (int64_t j = position; j >= 0; --j) {
                const double number = numbers[static_cast<size_t>(i * kKeys + j)];
                if (mask[static_cast<size_t>(i * kKeys + j)] == 0xfc00) continue;
                double score = 0;
                for (int64_t d = 0; d < kSize; ++d)
                    score += static_cast<double>(in.q[static_cast<size_t>((h * kKeys + i) * kSize + d)]) *
                             static_cast<double>(in.k[static_cast<size_t>((h * kKeys + j) * kSize + d)]);
                score *= static_cast<double>(p.scale);
                const auto cap = static_cast<double>(softcap);
                if (cap > 0) score = cap * std::tanh(score / cap);
                score += static_cast<double>(slopes[h]) * number;
                const bool always = j < p.rule.sinks || seen++ < p.rule.window;
                if (kept[static_cast<size_t>(j)]) {
                    total += std::exp(score);
                    for (int64_t d = 0; d < kSize; ++d)
                        sums[static_cast<size_t>(d)] +=
                            std::exp(score) *
                            static_cast<double>(in.v[static_cast<size_t>((h * kKeys + j) * kSize + d)]);
                    if (!always) worst_kept = std::min(worst_kept, score), ++chosen;
                } else {
                    CHECK(!always);
                    best_left = std::max(best_left, score), ++left;
                }
            }
            CHECK(chosen == std::min(top_k, chosen + left));
            CHECK(best_left <= worst_kept + 1e-5);
            for (int64_t d = 0; d < kSize; ++d)
                CHECK(std::fabs(static_cast<double>(out[static_cast<size_t>(row * kSize + d)]) -
                                sums[static_cast<size_t>(d)] / total) < 1e-5);
        }
    }
}

// What a softcap and numbers of a mask do to a mean cannot be told from the sum of both.
void a_mean_of_capped_scores_and_numbers_is_refused() {
    Inputs in(20);
    std::vector<uint16_t> mask(kQueries * kKeys, 0xb800);
    std::vector<float> out(kHeads * kQueries * kSize);
    Problem p = in.p;
    p.mask = {mask.data(), Mask::Form::halves, 0, 0, kKeys, 1};
    CHECK(attention(p, {1, Isa::portable}, output_of(p, out.data())) == Status::done);
    p.softcap = 5.0f;
    CHECK(attention(p, {1, Isa::portable}, output_of(p, out.data())) == Status::bad_mask);
}

// One query after another over a cache that grows and is changed behind our back.
void means_follow_the_cache() {
    for (const Isa isa : available_isas(detect())) {
        Inputs in(20);
        Problem p = in.p;
        p.num_queries = 1;
        ValueMeans means;
        const auto step = [&](int64_t keys) {
            p.num_keys = keys;
            p.first_position = keys - 1;
            std::vector<float> fresh(kHeads * kSize), kept(fresh);
            CHECK(attention(p, {1, isa}, output_of(p, fresh.data())) == Status::done);
            CHECK(attention(p, {2, isa}, output_of(p, kept.data()), nullptr, &means) == Status::done);
            CHECK(fresh == kept);
        };
        for (const int64_t keys : {300, 301, 320, 321, 400}) step(keys);
        for (int64_t i = 70 * kSize; i < 90 * kSize; ++i) {  // other tokens in the same places
            in.k[static_cast<size_t>(i)] += 1.0f;
            in.v[static_cast<size_t>(i)] -= 1.0f;
        }
        step(400);
        for (float& x : in.v) x *= 2.0f;  // other values under the same keys
        step(400);
        step(129);
    }
}

}  // namespace

int main() {
    means_follow_the_cache();
    dense_is_softmax();
    callers_on_several_threads_do_not_meet();
    interrupted_calls_end_early_and_leave_the_index_usable();
    reordered_index_follows_its_batch();
    mixed_formats_and_a_mask_of_halves();
    packed_masks_are_the_mask();
    numbers_of_a_mask_are_added(20, 0.0f);
    numbers_of_a_mask_are_added(20, 5.0f);
    numbers_of_a_mask_are_added(kKeys, 5.0f);
    a_mean_of_capped_scores_and_numbers_is_refused();
    return failures;
}
