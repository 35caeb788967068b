// MatMulCodebook for the CUDA execution provider: operands as in ../matmul_codebook.h, all in the
// GPU's memory. Products are of floats at every accuracy level.
#pragma once

#include "../operator.h"

namespace onnxq::cuda {

class MatMulCodebook {
  public:
    static constexpr const char* name = "MatMulCodebook";
    static constexpr Presence inputs[] = {Presence::required, Presence::required,
                                          Presence::required, Presence::required,
                                          Presence::optional, Presence::optional};

    static void infer(const ort::Inference&);
    explicit MatMulCodebook(const ort::NodeInfo&) {}
    void compute(const ort::Call&) const;
};

}  // namespace onnxq::cuda
