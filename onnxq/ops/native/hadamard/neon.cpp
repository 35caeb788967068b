#include <arm_neon.h>

#include "kernels.h"
#include "walsh.h"

namespace onnxq {
namespace {

struct Vector {
    static constexpr int lanes = 4;

    float32x4_t v;

    static Vector load(const float* at) { return {vld1q_f32(at)}; }
    void store(float* at) const { vst1q_f32(at, v); }
    Vector scaled(float scale) const { return {vmulq_n_f32(v, scale)}; }
    Vector operator+(Vector b) const { return {vaddq_f32(v, b.v)}; }
    Vector operator-(Vector b) const { return {vsubq_f32(v, b.v)}; }

    Vector stages() const {
        // Even and odd lanes apart; then sums and differences in turns.
        const float32x4_t even = vuzp1q_f32(v, v), odd = vuzp2q_f32(v, v);
        const float32x4_t one = vzip1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
        const float32x2_t low = vget_low_f32(one), high = vget_high_f32(one);
        return {vcombine_f32(vadd_f32(low, high), vsub_f32(low, high))};
    }
};

}  // namespace

void walsh_neon(const float* x, float* y, std::int64_t size, float scale) {
    walsh<Vector>(x, y, size, scale);
}

}  // namespace onnxq
