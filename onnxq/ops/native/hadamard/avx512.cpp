#include <immintrin.h>

#include "kernels.h"
#include "walsh.h"

namespace onnxq {
namespace {

struct Vector {
    static constexpr int lanes = 16;

    __m512 v;

    static Vector load(const float* at) { return {_mm512_loadu_ps(at)}; }
    void store(float* at) const { _mm512_storeu_ps(at, v); }
    Vector scaled(float scale) const { return {_mm512_mul_ps(v, _mm512_set1_ps(scale))}; }
    Vector operator+(Vector b) const { return {_mm512_add_ps(v, b.v)}; }
    Vector operator-(Vector b) const { return {_mm512_sub_ps(v, b.v)}; }

    Vector stages() const {
        const Vector one = stage(_mm512_permute_ps(v, 0xB1), 0xAAAA);
        const Vector two = one.stage(_mm512_permute_ps(one.v, 0x4E), 0xCCCC);
        const Vector four = two.stage(_mm512_shuffle_f32x4(two.v, two.v, 0xB1), 0xF0F0);
        return four.stage(_mm512_shuffle_f32x4(four.v, four.v, 0x4E), 0xFF00);
    }

  private:
    // The difference in lanes of `upper`, else the sum.
    Vector stage(__m512 other, __mmask16 upper) const {
        return {_mm512_mask_sub_ps(_mm512_add_ps(v, other), upper, other, v)};
    }
};

}  // namespace

void walsh_avx512(const float* x, float* y, std::int64_t size, float scale) {
    walsh<Vector>(x, y, size, scale);
}

}  // namespace onnxq
