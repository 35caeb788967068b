// NEON with products of bytes by sdot: ARM v8.2 and later.
#pragma once

#include "neon.h"

namespace onnxq {
namespace {

struct ProductsByDot {
    static int32x4_t dot(int32x4_t sums, int8x16_t w, int8x16_t x) { return vdotq_s32(sums, w, x); }
};

using NeonDot = NeonOf<ProductsByDot>;

}  // namespace
}  // namespace onnxq
