// Compiled twice: for AVX2, and with vpdpbusd where the compiler may use AVX-VNNI.
#include <immintrin.h>

#include "lattice_loop.h"

namespace onnxq {
namespace {

// Eight sums over quarters of a row.
__m256i row_product(const uint8_t* weights, __m256i x0, __m256i x1) {
  const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32));
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w0, x0), w1, x1);
#else
  // 4 products of at most 27 · 128 stay far inside 16 bits.
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

void product(const uint8_t (*weights)[kLatticeColumns], const int8_t* x, float scale,
             float* sums) {
  const __m256i x0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32));
  for (int row = 0; row < kLatticeRows; row += 8) {
    __m256i quarter[2];  // rows 0-3 and 4-7, either half of the register its own part of the sums
    for (int half = 0; half < 2; ++half) {
      __m256i r[4];
      for (int k = 0; k < 4; ++k) r[k] = row_product(weights[row + 4 * half + k], x0, x1);
      quarter[half] =
          _mm256_hadd_epi32(_mm256_hadd_epi32(r[0], r[1]), _mm256_hadd_epi32(r[2], r[3]));
    }
    const __m256i dots = _mm256_add_epi32(_mm256_permute2x128_si256(quarter[0], quarter[1], 0x20),
                                          _mm256_permute2x128_si256(quarter[0], quarter[1], 0x31));
    const __m256 before = _mm256_loadu_ps(sums + row);
    _mm256_storeu_ps(sums + row,
                     _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(scale), before));
  }
}

}  // namespace

#ifdef __AVXVNNI__
void lattice_avxvnni(const uint8_t* tiles, const LatticeInput& x, float* y) {
#else
void lattice_avx2(const uint8_t* tiles, const LatticeInput& x, float* y) {
#endif
  lattice_loop<product>(tiles, x, y);
}

}  // namespace onnxq
