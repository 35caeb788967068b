#include "lattice.h"

#include <cmath>
#include <cstring>

namespace onnxq {
namespace {

constexpr int kPoint = 8;

bool odd_parity(unsigned bits) {
  bits ^= bits >> 4;
  bits ^= bits >> 2;
  return (bits ^ bits >> 1) & 1;
}

struct Pattern {
  uint8_t ones = 0, twos = 0;
};

// S: the 227 patterns with |s|² <= 10, then 29 of those with |s|² = 12 spread evenly; in
// lexicographic order, as onnxq/lattice.py numbers them.
std::vector<Pattern> patterns() {
  std::vector<Pattern> found, longer;
  for (int number = 0; number < 6561; ++number) {
    Pattern pattern;
    int length = 2;  // |s|² = sum of (t + 1/2)² = 2 + sum of t (t + 1)
    for (int j = kPoint - 1, rest = number; j >= 0; --j, rest /= 3) {
      const int t = rest % 3;
      pattern.ones |= (t == 1) << j;
      pattern.twos |= (t == 2) << j;
      length += t * (t + 1);
    }
    if (length <= 10) found.push_back(pattern);
    if (length == 12) longer.push_back(pattern);
  }
  const int missing = 256 - static_cast<int>(found.size());
  const double step = (longer.size() - 1.0) / (missing - 1);
  for (int k = 0; k < missing; ++k) found.push_back(longer[std::nearbyint(k * step)]);
  return found;
}

uint64_t bytes(const uint8_t (&eight)[kPoint]) {
  uint64_t whole;
  std::memcpy(&whole, eight, sizeof whole);
  return whole;
}

LatticeTables make_tables() {
  constexpr uint8_t sign_bits = 0x1C;  // of w + 16: ~s  t1^s  t0^s; ~s as 16 was added
  constexpr uint8_t e_bit = 0x02;
  LatticeTables tables{};
  const std::vector<Pattern> all = patterns();
  for (int k = 0; k < 256; ++k) {
    const Pattern p = all[k];
    tables.not_ones[k] = ~p.ones;
    tables.not_twos[k] = ~p.twos;
    // e = -1 where the parity of the signs' byte differs from the pattern's; then bit 7 of the
    // signs is turned. Both tables tell their own half of that.
    uint8_t pattern[kPoint], sign[kPoint];
    const bool pattern_odd = odd_parity(p.ones), sign_odd = odd_parity(k);
    for (int j = 0; j < kPoint; ++j) {
      const bool plus = k >> j & 1, last = j == kPoint - 1;
      pattern[j] = (p.ones >> j & 1) << 2 | (p.twos >> j & 1) << 3;
      pattern[j] ^= (pattern_odd ? e_bit : 0) ^ (pattern_odd && last ? sign_bits : 0);
      sign[j] = 1 | (plus ? 0x10 : 0x0C) | e_bit;
      sign[j] ^= (sign_odd ? e_bit : 0) ^ (sign_odd && last ? sign_bits : 0);
    }
    tables.pattern[k] = bytes(pattern);
    tables.sign[k] = bytes(sign);
  }
  return tables;
}

}  // namespace

const LatticeTables& lattice_tables() {
  static const LatticeTables tables = make_tables();
  return tables;
}

void lattice_pack(const uint16_t* codes, int64_t rows, int64_t columns, uint8_t* tiles) {
  const LatticeTables& tables = lattice_tables();
  const int64_t points = (columns + kPoint - 1) / kPoint;
  const int64_t blocks = (columns + kLatticeColumns - 1) / kLatticeColumns;
  const int64_t padded = (rows + kLatticeRows - 1) / kLatticeRows * kLatticeRows;
  std::memset(tiles, 0, padded * blocks * (kLatticeTile / kLatticeRows));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t point = 0; point < points; ++point) {
      const unsigned code = codes[row * points + point];
      const unsigned pattern = code >> 8, minus = code >> 1 & 0x7F, e = code & 1;
      const bool last = odd_parity(minus) ^ odd_parity(tables.not_ones[pattern]);
      const unsigned plus = ~(minus | last << 7);
      uint8_t* tile = tiles + (row / kLatticeRows * blocks + point / 8) * kLatticeTile;
      uint8_t* half = tile + point % 8 / 4 * kLatticeHalf;
      const int at = lattice_position(row % kLatticeRows, point % 4);
      half[at] = static_cast<uint8_t>(pattern);
      half[64 + at] = static_cast<uint8_t>(plus ^ e << 7);
    }
  }
}

void lattice_decode(const uint8_t* tile, uint8_t out[kLatticeRows][kLatticeColumns]) {
  const LatticeTables& tables = lattice_tables();
  for (int row = 0; row < kLatticeRows; ++row) {
    for (int point = 0; point < 8; ++point) {
      const uint8_t* at = tile + point / 4 * kLatticeHalf + lattice_position(row, point % 4);
      const uint64_t w = tables.pattern[at[0]] ^ tables.sign[at[64]];
      std::memcpy(out[row] + kPoint * point, &w, sizeof w);
    }
  }
}

}  // namespace onnxq
