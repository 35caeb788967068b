// Registers of AVX2 for walsh.h.
#pragma once

#include <immintrin.h>

#include "walsh.h"

namespace onnxq {
namespace {

struct Avx2Walsh {
    static constexpr int lanes = 8;

    __m256 v;

    static Avx2Walsh load(const float* at) { return {_mm256_loadu_ps(at)}; }
    void store(float* at) const { _mm256_storeu_ps(at, v); }
    Avx2Walsh scaled(float scale) const { return {_mm256_mul_ps(v, _mm256_set1_ps(scale))}; }
    Avx2Walsh operator+(Avx2Walsh b) const { return {_mm256_add_ps(v, b.v)}; }
    Avx2Walsh operator-(Avx2Walsh b) const { return {_mm256_sub_ps(v, b.v)}; }

    Avx2Walsh stages() const {
        const Avx2Walsh one = stage<0xAA>(_mm256_permute_ps(v, 0xB1));
        const Avx2Walsh two = one.stage<0xCC>(_mm256_permute_ps(one.v, 0x4E));
        return two.stage<0xF0>(_mm256_permute2f128_ps(two.v, two.v, 0x01));
    }

  private:
    // The difference in lanes of `upper`, else the sum.
    template <int upper>
    Avx2Walsh stage(__m256 other) const {
        return {_mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), upper)};
    }
};

}  // namespace
}  // namespace onnxq
