// Registers of AVX-512 for walsh.h.
#pragma once

#include <immintrin.h>

#include "walsh.h"

namespace onnxq {
namespace {

struct Avx512Walsh {
    static constexpr int lanes = 16;

    __m512 v;

    static Avx512Walsh load(const float* at) { return {_mm512_loadu_ps(at)}; }
    void store(float* at) const { _mm512_storeu_ps(at, v); }
    Avx512Walsh scaled(float scale) const { return {_mm512_mul_ps(v, _mm512_set1_ps(scale))}; }
    Avx512Walsh operator+(Avx512Walsh b) const { return {_mm512_add_ps(v, b.v)}; }
    Avx512Walsh operator-(Avx512Walsh b) const { return {_mm512_sub_ps(v, b.v)}; }

    Avx512Walsh stages() const {
        const Avx512Walsh one = stage(_mm512_permute_ps(v, 0xB1), 0xAAAA);
        const Avx512Walsh two = one.stage(_mm512_permute_ps(one.v, 0x4E), 0xCCCC);
        const Avx512Walsh four = two.stage(_mm512_shuffle_f32x4(two.v, two.v, 0xB1), 0xF0F0);
        return four.stage(_mm512_shuffle_f32x4(four.v, four.v, 0x4E), 0xFF00);
    }

  private:
    // The difference in lanes of `upper`, else the sum.
    Avx512Walsh stage(__m512 other, __mmask16 upper) const {
        return {_mm512_mask_sub_ps(_mm512_add_ps(v, other), upper, other, v)};
    }
};

}  // namespace
}  // namespace onnxq
