// The E8P lattice of QuIP# (Tseng et al. 2024, §4.2): how its codes lie in memory for the kernels.
//
// A point is eight coordinates w/4 with w odd in -11..11:
//     w = σ (4 t + 2) + e,   t in {0, 1, 2},   σ = ±1,   e = ±1 for all eight,
// and its code 8 bits for the pattern t, 7 for signs and 1 for e. In two's complement
//     w = [s s s s  t1^s  t0^s  p  1],   s = 1 for minus, p = 1 for e = +1
// as 4t + 2 negated is 4(~t) + 2. Each bit is a sum modulo 2 of bits of the code and of the
// pattern's, so a point decodes by XOR: 8 bytes for the pattern ^ 8 bytes for the signs.
#pragma once

#include <cstdint>
#include <vector>

namespace onnxq {

constexpr int kLatticeRows = 16;      // rows of a tile
constexpr int kLatticeColumns = 64;   // columns of a tile, and the block of rounded activations
constexpr int kLatticeTile = 256;     // bytes of a tile: two bits for each of its weights
constexpr int kLatticeHalf = 128;     // 32 columns: 64 bytes of patterns, then 64 of signs
constexpr int kLatticeOffset = 16;    // decoded bytes are w + 16, in 5..27: u8 and s8 alike

// Where the point of `row` and of columns 8 `point` … 8 `point` + 7 lies in either plane of a half.
// The order is that in which AVX-512's interleaving of bytes meets eight rows in eight quadwords,
// rows 0-7 in the high nibbles, rows 8-15 in the low ones.
constexpr int lattice_position(int row, int point) {
  return 16 * (row % 8 / 2) + 4 * point + 2 * (row % 2) + row / 8;
}

struct LatticeTables {
  uint8_t not_ones[256], not_twos[256];  // bit j: coordinate j has t != 1, t != 2
  uint64_t pattern[256], sign[256];      // pattern[p] ^ sign[s]: the bytes w + 16 of a point
};

const LatticeTables& lattice_tables();

// `codes` (rows, ceil(columns / 8)) as tiles (ceil(rows / 16), ceil(columns / 64), kLatticeTile).
// The byte of signs holds 1 for plus in bits 0-6; bit 7 is that ^ (1 for e = -1), from which the
// parity that E8P prescribes gives both back.
void lattice_pack(const uint16_t* codes, int64_t rows, int64_t columns, uint8_t* tiles);

// w + 16 of all weights of a tile.
void lattice_decode(const uint8_t* tile, uint8_t out[kLatticeRows][kLatticeColumns]);

// Activations rounded to 8 bits in blocks of 64, `blocks` of them, zero beyond the last column.
struct LatticeInput {
  const int8_t* values;  // (count, 64 blocks)
  const float* scales;   // (count, blocks)
  const float* sums;     // (count): of the rounded activations, sum of scale · value
  int64_t count, blocks;
};

// y (count, 16) = sum over columns of point · x for the 16 rows of `tiles` (blocks, kLatticeTile).
using LatticeKernel = void (*)(const uint8_t* tiles, const LatticeInput& x, float* y);

void lattice_portable(const uint8_t* tiles, const LatticeInput& x, float* y);
void lattice_avx2(const uint8_t* tiles, const LatticeInput& x, float* y);
void lattice_avxvnni(const uint8_t* tiles, const LatticeInput& x, float* y);
void lattice_avx512(const uint8_t* tiles, const LatticeInput& x, float* y);  // VBMI, VNNI, GFNI
void lattice_neon(const uint8_t* tiles, const LatticeInput& x, float* y);
void lattice_neon_dot(const uint8_t* tiles, const LatticeInput& x, float* y);

}  // namespace onnxq
