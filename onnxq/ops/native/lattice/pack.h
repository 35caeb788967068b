// From the operands of MatMulLattice to the arrangement that kernels read.
#pragma once

#include <vector>

#include "../codebook/pack.h"
#include "weights.h"

namespace onnxq {

class PackedLattice {
  public:
    // codes (channels, points); scales by channel.
    PackedLattice(const std::uint16_t* codes, std::size_t channels, std::size_t points,
                  const Numbers& scales);
    const LatticeWeights& weights() const { return weights_; }

  private:
    LatticeWeights weights_;
    AlignedBuffer tiles_;
    std::vector<float> scales_;
};

// The 16 channels of a group as weights of 4 bits, which the product of floats takes: nibbles n in
// `codes` (16, 32 · blocks), and the channels' scales in `scales` (16, blocks).
FloatWeights lattice_as_codebook(const LatticeWeights&, std::size_t group, std::uint8_t* codes,
                                 float* scales);

}  // namespace onnxq
