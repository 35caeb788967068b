// HadamardTransform(x) -> y
//
//     y = H x / √size  for each block of `size` numbers along the last axis,  H Hᵀ = size · I
//
// x, y         float32 or float16 (..., L)
// block_size   size; 0, the default: L. It divides L and is 2^m, where H[i, j] = (-1)^popcount(i & j),
//              or n · 2^m with n = 12, 20 or 28, where H = H_n ⊗ H_2^m and H_n is Paley's.
#pragma once

#include "kernels.h"
#include "operator.h"

namespace onnxq {

class HadamardTransform {
  public:
    static constexpr const char* name = "HadamardTransform";
    static constexpr Presence inputs[] = {Presence::required};

    static void infer(const ort::Inference&);
    explicit HadamardTransform(const ort::NodeInfo&);
    void compute(const ort::Call&) const;

  private:
    const Kernels* kernels_;
    std::int64_t block_size_;
};

}  // namespace onnxq
