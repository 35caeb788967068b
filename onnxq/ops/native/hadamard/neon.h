// Registers of NEON for walsh.h.
#pragma once

#include <arm_neon.h>

#include "walsh.h"

namespace onnxq {
namespace {

struct NeonWalsh {
    static constexpr int lanes = 4;

    float32x4_t v;

    static NeonWalsh load(const float* at) { return {vld1q_f32(at)}; }
    void store(float* at) const { vst1q_f32(at, v); }
    NeonWalsh scaled(float scale) const { return {vmulq_n_f32(v, scale)}; }
    NeonWalsh operator+(NeonWalsh b) const { return {vaddq_f32(v, b.v)}; }
    NeonWalsh operator-(NeonWalsh b) const { return {vsubq_f32(v, b.v)}; }

    NeonWalsh stages() const {
        // Even and odd lanes apart; then sums and differences in turns.
        const float32x4_t even = vuzp1q_f32(v, v), odd = vuzp2q_f32(v, v);
        const float32x4_t one = vzip1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
        const float32x2_t low = vget_low_f32(one), high = vget_high_f32(one);
        return {vcombine_f32(vadd_f32(low, high), vsub_f32(low, high))};
    }
};

}  // namespace
}  // namespace onnxq
