#include "lattice_loop.h"

namespace onnxq {
namespace {

void product(const uint8_t (*weights)[kLatticeColumns], const int8_t* x, float scale,
             float* sums) {
  for (int row = 0; row < kLatticeRows; ++row) {
    int32_t dot = 0;
    for (int k = 0; k < kLatticeColumns; ++k) dot += weights[row][k] * x[k];
    sums[row] += scale * dot;
  }
}

}  // namespace

void lattice_portable(const uint8_t* tiles, const LatticeInput& x, float* y) {
  lattice_loop<product>(tiles, x, y);
}

}  // namespace onnxq
