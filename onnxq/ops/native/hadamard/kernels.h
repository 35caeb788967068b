// What every instruction set brings for HadamardTransform.
#pragma once

#include <cstdint>

namespace onnxq {

// y = scale · H x for Sylvester's H of `size`, a power of two; y may be x.
using Walsh = void (*)(const float* x, float* y, std::int64_t size, float scale);

}  // namespace onnxq
