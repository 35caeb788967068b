// x in 8 bits, in blocks: scale = max |x| / 127, code = x / scale rounded half to even.
//
// A block with infinite or undefined values gets an undefined scale, and y is undefined there.
#pragma once

#include "weights.h"

namespace onnxq {
namespace {

template <class Simd>
inline void round_block(const float* x, std::size_t block, std::int8_t* codes, float& scale,
                        std::int32_t& sum) {
    auto largest = Simd::splat(0.0f), undefined = Simd::splat(0.0f);
    for (std::size_t k = 0; k < block; k += lanes) {
        const auto value = Simd::load(x + k);
        largest = Simd::larger_magnitude(largest, value);
        undefined = Simd::fma(value, Simd::splat(0.0f), undefined);  // 0, or not a number
    }
    scale = Simd::largest_of(largest) / 127.0f;
    const auto divisor = Simd::splat(scale > 0 ? scale : 1.0f);
    scale += Simd::sum_of(undefined);
    auto sums = Simd::splat(std::int32_t{0});
    for (std::size_t k = 0; k < block; k += lanes) {
        const auto rounded = Simd::round_to_127(Simd::divide(Simd::load(x + k), divisor));
        sums = Simd::add(sums, rounded);
        Simd::store_low_bytes(codes + k, rounded);
    }
    sum = Simd::sum_of(sums);
}

template <class Simd>
void round_rows(const float* x, std::size_t k, Range rows, const RoundedRows& to) {
    const std::size_t columns = to.blocks * to.block;
    for (std::size_t row = rows.begin; row < rows.end; row++)
        for (std::size_t b = 0; b < to.blocks; b++) {
            const float* from = x + row * k + b * to.block;
            const std::size_t left = k - b * to.block, at = row * to.blocks + b;
            float padded[most_block];
            if (left < to.block) {
                for (std::size_t i = 0; i < to.block; i++) padded[i] = i < left ? from[i] : 0.0f;
                from = padded;
            }
            round_block<Simd>(from, to.block, to.codes + row * columns + b * to.block,
                              to.scales[at], to.sums[at]);
        }
}

}  // namespace
}  // namespace onnxq
