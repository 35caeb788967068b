// y = x Wᵀ + bias on an NVIDIA GPU, for a codebook of 16 levels: see ../codebook/weights.h for W.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace onnxq::cuda {

enum class Number { float32, float16, int8 };

// Numbers by output channel and block, in device memory; a stride of 0 says: the same for all.
struct Numbers {
    const void* data = nullptr;
    Number type = Number::float32;
    std::int64_t per_channel = 0, per_block = 0;
};

// All pointers are of device memory.
struct Product {
    Number type = Number::float32;  // of x, y and bias
    const void* x = nullptr;        // (rows, inputs)
    void* y = nullptr;              // (rows, channels)
    std::int64_t rows = 0, inputs = 0, channels = 0, block = 0;
    const std::uint8_t* codes = nullptr;  // (channels, ⌈inputs / block⌉, block / 2), low half first
    Numbers scales, codebook, zero_points, bias;  // the last two with data null: zeros
};

// Queues the kernels on `stream` and does not wait for them.
cudaError_t multiply(const Product&, cudaStream_t stream);

}  // namespace onnxq::cuda
