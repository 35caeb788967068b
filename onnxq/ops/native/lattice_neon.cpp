// Compiled twice: for plain NEON, and with sdot where the compiler may use the dot product.
#include <arm_neon.h>

#include "lattice_loop.h"

namespace onnxq {
namespace {

// Four sums over quarters of a row.
int32x4_t row_product(const uint8_t* weights, const int8x16_t (&x)[4]) {
#ifdef __ARM_FEATURE_DOTPROD
  int32x4_t sum = vdupq_n_s32(0);
  for (int k = 0; k < 4; ++k) {
    sum = vdotq_s32(sum, vreinterpretq_s8_u8(vld1q_u8(weights + 16 * k)), x[k]);
  }
  return sum;
#else
  int16x8_t pairs = vdupq_n_s16(0);  // 8 products of at most 27 · 128 fit 16 bits
  for (int k = 0; k < 4; ++k) {
    const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(weights + 16 * k));
    pairs = vmlal_s8(pairs, vget_low_s8(w), vget_low_s8(x[k]));
    pairs = vmlal_s8(pairs, vget_high_s8(w), vget_high_s8(x[k]));
  }
  return vpaddlq_s16(pairs);
#endif
}

void product(const uint8_t (*weights)[kLatticeColumns], const int8_t* x, float scale,
             float* sums) {
  const int8x16_t in[4] = {vld1q_s8(x), vld1q_s8(x + 16), vld1q_s8(x + 32), vld1q_s8(x + 48)};
  for (int row = 0; row < kLatticeRows; row += 4) {
    int32x4_t r[4];
    for (int k = 0; k < 4; ++k) r[k] = row_product(weights[row + k], in);
    const int32x4_t dots = vpaddq_s32(vpaddq_s32(r[0], r[1]), vpaddq_s32(r[2], r[3]));
    vst1q_f32(sums + row, vfmaq_n_f32(vld1q_f32(sums + row), vcvtq_f32_s32(dots), scale));
  }
}

}  // namespace

#ifdef __ARM_FEATURE_DOTPROD
void lattice_neon_dot(const uint8_t* tiles, const LatticeInput& x, float* y) {
#else
void lattice_neon(const uint8_t* tiles, const LatticeInput& x, float* y) {
#endif
  lattice_loop<product>(tiles, x, y);
}

}  // namespace onnxq
