// MatMulLattice(x, codes, scales[, bias]) -> y
//
//     y = x Wᵀ + bias,  W[n, 8 c … 8 c + 7] = scales[n] · point(codes[n, c])
//
// x, bias, y   float32 or float16; x (..., K), bias (N) or (1)
// codes        uint16 (N, ⌈K / 8⌉): points of E8P, see lattice/weights.h
// scales       float32 or float16 (N)
// accuracy_level 0: float32. 4: x is rounded to 8 bits in blocks of 64.
//
// Codes that are initializers are arranged for the CPU when the session is made, others in every
// call; in two bits for each weight either way.
#pragma once

#include <optional>

#include "kernels.h"
#include "lattice/pack.h"
#include "operator.h"

namespace onnxq {

class MatMulLattice {
  public:
    static constexpr const char* name = "MatMulLattice";
    static constexpr Presence inputs[] = {Presence::required, Presence::required,
                                          Presence::required, Presence::optional};

    static void infer(const ort::Inference&);
    explicit MatMulLattice(const ort::NodeInfo&);
    void compute(const ort::Call&) const;

  private:
    struct Packed {
        std::size_t points;  // of a channel
        PackedLattice lattice;
    };
    static Packed pack(const ort::Tensor& codes, const ort::Tensor& scales);

    const Kernels* kernels_;
    bool round_x_;
    std::optional<Packed> packed_;
};

}  // namespace onnxq
