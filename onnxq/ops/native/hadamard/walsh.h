// The fast Walsh-Hadamard transform (Fino and Algazi 1976, "Unified Matrix Treatment of the Fast
// Walsh-Hadamard Transform"): y = H x with H[i, j] = (-1)^popcount(i & j), in m stages of
// butterflies (a, b) -> (a + b, a - b), one for each bit of the index.
//
// Eight registers go through memory at once, so that one pass does three stages, and the first
// one those within a register besides. Vector tells how a register is loaded and stored, has + and
// -, and `stages()`: the transform of its own lanes.
#pragma once

#include <cstdint>

namespace onnxq {
namespace {  // each file compiles its own copy, with its own instructions

// By halves, so that compilers unroll it whole and keep v in registers.
template <int count, class Vector>
inline void butterflies(Vector* v) {
    if constexpr (count > 1) {
        butterflies<count / 2>(v);
        butterflies<count / 2>(v + count / 2);
        for (int k = 0; k < count / 2; k++) {
            const Vector a = v[k], b = v[k + count / 2];
            v[k] = a + b;
            v[k + count / 2] = a - b;
        }
    }
}

// The lowest stages, of `count` registers that lie together.
template <int count, class Vector>
void first_pass(const float* x, float* y, std::int64_t size, float scale) {
    for (std::int64_t at = 0; at < size; at += count * Vector::lanes) {
        Vector v[count];
        for (int k = 0; k < count; k++) {
            v[k] = Vector::load(x + at + k * Vector::lanes).scaled(scale).stages();
        }
        butterflies<count>(v);
        for (int k = 0; k < count; k++) v[k].store(y + at + k * Vector::lanes);
    }
}

// The stages from `stride` on, of `count` registers that lie so far apart.
template <int count, class Vector>
void later_pass(float* y, std::int64_t size, std::int64_t stride) {
    for (std::int64_t block = 0; block < size; block += count * stride) {
        for (std::int64_t at = block; at < block + stride; at += Vector::lanes) {
            Vector v[count];
            for (int k = 0; k < count; k++) v[k] = Vector::load(y + at + k * stride);
            butterflies<count>(v);
            for (int k = 0; k < count; k++) v[k].store(y + at + k * stride);
        }
    }
}

// What is smaller than a register.
inline void walsh_small(const float* x, float* y, std::int64_t size, float scale) {
    for (std::int64_t k = 0; k < size; k++) y[k] = scale * x[k];
    for (std::int64_t stride = 1; stride < size; stride *= 2) {
        for (std::int64_t k = 0; k < size; k++) {
            if (k & stride) continue;
            const float a = y[k], b = y[k + stride];
            y[k] = a + b;
            y[k + stride] = a - b;
        }
    }
}

// y = scale · H x, for a size that is a power of two; y may be x.
template <class Vector>
void walsh(const float* x, float* y, std::int64_t size, float scale) {
    constexpr std::int64_t most = 8;  // registers at once
    if (size < Vector::lanes) return walsh_small(x, y, size, scale);
    std::int64_t done = size < most * Vector::lanes ? size : most * Vector::lanes;
    switch (done / Vector::lanes) {
        case 1: first_pass<1, Vector>(x, y, size, scale); break;
        case 2: first_pass<2, Vector>(x, y, size, scale); break;
        case 4: first_pass<4, Vector>(x, y, size, scale); break;
        default: first_pass<8, Vector>(x, y, size, scale);
    }
    while (done < size) {
        const std::int64_t count = size / done < most ? size / done : most;
        switch (count) {
            case 2: later_pass<2, Vector>(y, size, done); break;
            case 4: later_pass<4, Vector>(y, size, done); break;
            default: later_pass<8, Vector>(y, size, done);
        }
        done *= count;
    }
}

}  // namespace
}  // namespace onnxq
