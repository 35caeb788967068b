// MatMulCodebook(x, codes, scales, codebook[, zero_points][, bias]) -> y
//
//     y = x Wᵀ + bias,  W[n,k] = scales[n,b] · (codebook[n,b,codes[n,k]] − zero_points[n,b])
//
// x, bias, y   float32 or float16; x (..., K), bias (N) or (1)
// codes        uint8 (N, blocks, block / 2), low half first; block a multiple of 16 from 16 to 256
// scales       float32 or float16 (N, blocks)
// codebook     int8 or float32 (1 or N, 1 or blocks, 16)
// zero_points  int8 or the type of scales, (N, blocks) or (1, 1)
// accuracy_level 0: float32. 4, with a codebook of int8: x is rounded to 8 bits in blocks.
//
// Weights that are initializers are arranged for the CPU when the session is made, once. Weights
// that a model computes are arranged again in every call.
#pragma once

#include <memory>
#include <optional>

#include "codebook/pack.h"
#include "kernels.h"
#include "operator.h"

namespace onnxq {

class MatMulCodebook {
  public:
    static constexpr const char* name = "MatMulCodebook";
    static constexpr Presence inputs[] = {Presence::required, Presence::required,
                                          Presence::required, Presence::required,
                                          Presence::optional, Presence::optional};

    static void infer(const ort::Inference&);
    explicit MatMulCodebook(const ort::NodeInfo& node) : MatMulCodebook(node, 4) {}
    void compute(const ort::Call&) const;

  protected:
    MatMulCodebook(const ort::NodeInfo&, std::int64_t bits);

  private:
    struct Packed {
        std::size_t channels = 0, block = 0, blocks = 0;
        std::optional<PackedIntegerWeights> integers;
        std::optional<PackedFloatWeights> floats;
    };
    struct Operands {
        ort::Tensor codes, scales, codebook, zero_points;
    };

    Packed pack(const Operands&) const;

    std::int64_t bits_;  // of a code
    const Kernels* kernels_;
    bool round_x_;
    bool packed_zero_points_ = false;
    std::optional<Packed> packed_;
};

// The same with codes of three bits and eight levels:
//
// codes        uint8 (N, blocks, 3 · block / 8); of each block first the low two bits of all codes,
//              four codes a byte, then the high bits, eight a byte, the first in the lowest bits
// codebook     int8 or float32 (1 or N, 1 or blocks, 8)
class MatMul3 : public MatMulCodebook {
  public:
    static constexpr const char* name = "MatMul3";

    explicit MatMul3(const ort::NodeInfo& node) : MatMulCodebook(node, 3) {}
};

}  // namespace onnxq
