// What a compiler may make registers of for walsh.h.
#pragma once

#include "walsh.h"

namespace onnxq {
namespace {

// Lanes that a compiler may put in a register of any width up to theirs.
struct PortableWalsh {
    static constexpr int lanes = 4;

    float v[lanes];

    static PortableWalsh load(const float* at) { return {{at[0], at[1], at[2], at[3]}}; }
    void store(float* at) const { for (int k = 0; k < lanes; k++) at[k] = v[k]; }
    PortableWalsh scaled(float scale) const {
        return {{v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale}};
    }
    PortableWalsh operator+(const PortableWalsh& b) const {
        return {{v[0] + b.v[0], v[1] + b.v[1], v[2] + b.v[2], v[3] + b.v[3]}};
    }
    PortableWalsh operator-(const PortableWalsh& b) const {
        return {{v[0] - b.v[0], v[1] - b.v[1], v[2] - b.v[2], v[3] - b.v[3]}};
    }
    PortableWalsh stages() const {
        PortableWalsh w = *this;
        butterflies<lanes>(w.v);
        return w;
    }
};

}  // namespace
}  // namespace onnxq
