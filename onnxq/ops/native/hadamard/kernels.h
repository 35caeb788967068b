#pragma once

#include <cstdint>

namespace onnxq {

// y = scale · H x for Sylvester's H of `size`, a power of two; y may be x.
using Walsh = void (*)(const float* x, float* y, std::int64_t size, float scale);

void walsh_portable(const float* x, float* y, std::int64_t size, float scale);
void walsh_avx2(const float* x, float* y, std::int64_t size, float scale);
void walsh_avx512(const float* x, float* y, std::int64_t size, float scale);
void walsh_neon(const float* x, float* y, std::int64_t size, float scale);

}  // namespace onnxq
