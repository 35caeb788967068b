#include "kernels.h"
#include "walsh.h"

namespace onnxq {
namespace {

// Lanes that a compiler may put in a register of any width up to theirs.
struct Vector {
    static constexpr int lanes = 4;

    float v[lanes];

    static Vector load(const float* at) { return {{at[0], at[1], at[2], at[3]}}; }
    void store(float* at) const { std::copy(v, v + lanes, at); }
    Vector scaled(float scale) const {
        return {{v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale}};
    }
    Vector operator+(const Vector& b) const {
        return {{v[0] + b.v[0], v[1] + b.v[1], v[2] + b.v[2], v[3] + b.v[3]}};
    }
    Vector operator-(const Vector& b) const {
        return {{v[0] - b.v[0], v[1] - b.v[1], v[2] - b.v[2], v[3] - b.v[3]}};
    }
    Vector stages() const {
        Vector w = *this;
        butterflies<lanes>(w.v);
        return w;
    }
};

}  // namespace

void walsh_portable(const float* x, float* y, std::int64_t size, float scale) {
    walsh<Vector>(x, y, size, scale);
}

}  // namespace onnxq
