#include <immintrin.h>

#include "kernels.h"
#include "walsh.h"

namespace onnxq {
namespace {

struct Vector {
    static constexpr int lanes = 8;

    __m256 v;

    static Vector load(const float* at) { return {_mm256_loadu_ps(at)}; }
    void store(float* at) const { _mm256_storeu_ps(at, v); }
    Vector scaled(float scale) const { return {_mm256_mul_ps(v, _mm256_set1_ps(scale))}; }
    Vector operator+(Vector b) const { return {_mm256_add_ps(v, b.v)}; }
    Vector operator-(Vector b) const { return {_mm256_sub_ps(v, b.v)}; }

    Vector stages() const {
        const Vector one = stage<0xAA>(_mm256_permute_ps(v, 0xB1));
        const Vector two = one.stage<0xCC>(_mm256_permute_ps(one.v, 0x4E));
        return two.stage<0xF0>(_mm256_permute2f128_ps(two.v, two.v, 0x01));
    }

  private:
    // The difference in lanes of `upper`, else the sum.
    template <int upper>
    Vector stage(__m256 other) const {
        return {_mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), upper)};
    }
};

}  // namespace

void walsh_avx2(const float* x, float* y, std::int64_t size, float scale) {
    walsh<Vector>(x, y, size, scale);
}

}  // namespace onnxq
