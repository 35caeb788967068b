// 128 points at a time: patterns looked up in registers, and bits made bytes by an 8×8 product
// over GF(2). Needs AVX-512 VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "lattice.h"

namespace onnxq {
namespace {

constexpr int kVectors = 8;  // of a tile: one for each eight columns

// Nibbles n = (w + 15) / 2 of a tile: vector c holds, in quadword r, the columns 8c … 8c + 7 of
// row r in its high nibbles and of row r + 8 in its low ones.
class Decoder {
 public:
  Decoder() {
    const LatticeTables& tables = lattice_tables();
    for (int k = 0; k < 4; ++k) {
      ones_[k] = _mm512_loadu_si512(tables.not_ones + 64 * k);
      twos_[k] = _mm512_loadu_si512(tables.not_twos + 64 * k);
    }
  }

  void half(const uint8_t* at, __m512i* out) const {
    const __m512i pattern = _mm512_loadu_si512(at), signs = _mm512_loadu_si512(at + 64);
    const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
    const __mmask64 upper = _mm512_movepi8_mask(pattern);
    const __m512i not_ones = look_up(ones_, pattern, upper);
    const __m512i not_twos = look_up(twos_, pattern, upper);

    // Four planes of bits, a byte for each point: bit 3 of n is plus, bits 2 and 1 are t ^ minus =
    // ~t ^ plus, bit 0 is e > 0: the parity of signs and pattern, spread over the byte.
    constexpr int kXorAndNot = 0xD2;  // a ^ (~b & c)
    const __m512i mixed = _mm512_xor_si512(not_ones, signs);
    const __m512i bit0 = _mm512_gf2p8affine_epi64_epi8(mixed, _mm512_set1_epi64(-1), 0xFF);
    const __m512i bit3 = _mm512_ternarylogic_epi64(signs, bit0, top, kXorAndNot);
    const __m512i bit1 = _mm512_ternarylogic_epi64(mixed, bit0, top, kXorAndNot);
    const __m512i bit2 = _mm512_xor_si512(not_twos, bit3);

    // Quadwords of two points' planes are 8×8 matrices; times the unit vectors: their columns.
    const __m512i high0 = _mm512_unpacklo_epi8(bit3, bit2);
    const __m512i high1 = _mm512_unpackhi_epi8(bit3, bit2);
    const __m512i low0 = _mm512_unpacklo_epi8(bit1, bit0);
    const __m512i low1 = _mm512_unpackhi_epi8(bit1, bit0);
    const __m512i units = _mm512_set1_epi64(0x8040201008040201);
    out[0] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpacklo_epi16(high0, low0), 0);
    out[1] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpackhi_epi16(high0, low0), 0);
    out[2] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpacklo_epi16(high1, low1), 0);
    out[3] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_unpackhi_epi16(high1, low1), 0);
  }

  void tile(const uint8_t* at, __m512i* out) const {
    half(at, out);
    half(at + kLatticeHalf, out + kVectors / 2);
  }

 private:
  static __m512i look_up(const __m512i* table, __m512i index, __mmask64 upper) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], index, table[1]),
                                  _mm512_permutex2var_epi8(table[2], index, table[3]));
  }

  __m512i ones_[4], twos_[4];
};

// Sums over n · x of rows 0-7 (16 times that) and of rows 8-15, two lanes for each row.
struct Sums {
  __m512 high, low;
};

// The products keep high nibbles where they are: n in both places counts 16 · high + low.
void product(const __m512i* nibbles, const int8_t* x, float scale, Sums& sums) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xF0));
  __m512i both = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  for (int c = 0; c < kVectors; ++c) {
    int64_t eight;
    std::memcpy(&eight, x + 8 * c, sizeof eight);
    const __m512i in = _mm512_set1_epi64(eight);
    both = _mm512_dpbusd_epi32(both, nibbles[c], in);
    high = _mm512_dpbusd_epi32(high, _mm512_and_si512(nibbles[c], mask), in);
  }
  const __m512 s = _mm512_set1_ps(scale);
  sums.high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), s, sums.high);
  sums.low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(both, high)), s, sums.low);
}

// Points are w / 4 = (2 n - 15) / 4.
void finish(const Sums& sums, float input_sum, float* y) {
  float high[16], low[16];
  _mm512_storeu_ps(high, sums.high);
  _mm512_storeu_ps(low, sums.low);
  for (int row = 0; row < 8; ++row) {
    y[row] = (high[2 * row] + high[2 * row + 1]) / 32 - 3.75f * input_sum;
    y[8 + row] = (low[2 * row] + low[2 * row + 1]) / 2 - 3.75f * input_sum;
  }
}

}  // namespace

void lattice_avx512(const uint8_t* tiles, const LatticeInput& x, float* y) {
  constexpr int64_t kMost = 64;  // rows of activations that share a decoded tile: their sums fit L1
  const Decoder decoder;
  for (int64_t first = 0; first < x.count; first += kMost) {
    const int64_t count = std::min(kMost, x.count - first);
    Sums sums[kMost];
    for (int64_t m = 0; m < count; ++m) sums[m] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t block = 0; block < x.blocks; ++block) {
      const uint8_t* tile = tiles + block * kLatticeTile;
      for (int line = 0; line < kLatticeTile; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(tile + 8 * kLatticeTile + line), _MM_HINT_T0);
      }
      __m512i nibbles[kVectors];
      decoder.tile(tile, nibbles);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t at = (first + m) * x.blocks + block;
        product(nibbles, x.values + at * kLatticeColumns, x.scales[at], sums[m]);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      finish(sums[m], x.sums[first + m], y + (first + m) * kLatticeRows);
    }
  }
}

}  // namespace onnxq
