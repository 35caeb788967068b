// Hadamard matrices of sizes that are no powers of two, by Paley's first construction.
#pragma once

#include <cstdint>

namespace onnxq {

// How a block of `size` splits: H = H_n ⊗ H_rest with n = 1, 12, 20 or 28 and rest a power of two.
struct HadamardSize {
    std::int64_t n, rest;
};

// Throws Error where no such matrix is known here.
HadamardSize hadamard_size(std::int64_t size);

// y = H_n y for the n rows of y (n, columns), in place.
void paley_mix(float* y, std::int64_t n, std::int64_t columns);

}  // namespace onnxq
