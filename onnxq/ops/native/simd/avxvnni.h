// AVX2 with products of bytes by vpdpbusd in its AVX encoding: CPUs with VNNI and without AVX-512.
#pragma once

#include "avx2.h"

namespace onnxq {
namespace {

struct ProductsByAvxVnni {
    static constexpr int bias = 128;  // vpdpbusd multiplies unsigned by signed bytes

    static __m256i dot(__m256i sums, __m256i w, __m256i x) {
        return _mm256_dpbusd_avx_epi32(sums, w, x);
    }
};

using AvxVnni = Avx2Of<ProductsByAvxVnni>;

}  // namespace
}  // namespace onnxq
