// The kernels without AVX-512: a tile is decoded by the tables of lattice.h, then each row of
// activations meets it. What differs between instruction sets is the product alone.
#pragma once

#include "lattice.h"

namespace onnxq {
namespace {  // each file compiles its own copy, with its own instructions

// sums[row] += scale · sum over 64 columns of weights[row] · x, for 16 rows.
using TileProduct = void (*)(const uint8_t (*weights)[kLatticeColumns], const int8_t* x,
                             float scale, float* sums);

template <TileProduct product>
void lattice_loop(const uint8_t* tiles, const LatticeInput& x, float* y) {
  for (int64_t k = 0; k < x.count * kLatticeRows; ++k) y[k] = 0;
  for (int64_t block = 0; block < x.blocks; ++block) {
    uint8_t weights[kLatticeRows][kLatticeColumns];
    lattice_decode(tiles + block * kLatticeTile, weights);
    for (int64_t m = 0; m < x.count; ++m) {
      const int64_t at = m * x.blocks + block;
      product(weights, x.values + at * kLatticeColumns, x.scales[at], y + m * kLatticeRows);
    }
  }
  for (int64_t m = 0; m < x.count; ++m) {
    for (int row = 0; row < kLatticeRows; ++row) {
      float& sum = y[m * kLatticeRows + row];
      sum = (sum - kLatticeOffset * x.sums[m]) / 4;
    }
  }
}

}  // namespace
}  // namespace onnxq
