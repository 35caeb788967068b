#include "hadamard_transform.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "hadamard/paley.h"
#include "linear.h"

namespace onnxq {

using ort::Element;
using ort::Tensor;

namespace {

struct Block {
    HadamardSize size;
    Walsh walsh;

    std::int64_t length() const { return size.n * size.rest; }

    void transform(const float* x, float* y) const {
        const float scale = 1.0f / std::sqrt(static_cast<float>(length()));
        for (std::int64_t row = 0; row < size.n; row++)
            walsh(x + row * size.rest, y + row * size.rest, size.rest, scale);
        if (size.n > 1) paley_mix(y, size.n, size.rest);
    }

    void transform(const Half* x, Half* y) const {
        const auto count = static_cast<std::size_t>(length());
        Scratch scratch;
        const auto floats = scratch.reserve<float>(count);
        scratch.allocate();
        std::transform(x, x + count, floats.get(), [](Half value) { return to_float(value); });
        transform(floats.get(), floats.get());
        std::transform(floats.get(), floats.get() + count, y, to_half);
    }
};

template <class T>
void transform_all(const ort::Call& call, const Block& block, const Tensor& x, void* y) {
    constexpr std::int64_t least = 1 << 14;  // numbers that are worth a thread's while
    const std::int64_t blocks = x.shape.elements() / block.length();
    const std::int64_t at_once = std::max<std::int64_t>(1, least / block.length());
    const auto pieces = static_cast<std::size_t>((blocks + at_once - 1) / at_once);
    call.parallel(pieces, [&](std::size_t piece) {
        const std::int64_t first = static_cast<std::int64_t>(piece) * at_once;
        for (std::int64_t b = first; b < std::min(blocks, first + at_once); b++)
            block.transform(x.as<T>() + b * block.length(),
                            static_cast<T*>(y) + b * block.length());
    });
}

}  // namespace

void HadamardTransform::infer(const ort::Inference& inference) {
    inference.output(0, inference.input(0));
}

HadamardTransform::HadamardTransform(const ort::NodeInfo& node)
    : kernels_(&kernels()), block_size_(node.attribute("block_size", 0)) {
    require(block_size_ >= 0, "block_size is ", block_size_, "; it must be 0 or a size");
    if (block_size_ > 0) hadamard_size(block_size_);
}

void HadamardTransform::compute(const ort::Call& call) const {
    const Tensor x = call.input(0);
    Linear::check_float("x", x);
    require(x.shape.rank > 0, "x is a scalar; it must have a last axis");
    const std::int64_t size = block_size_ ? block_size_ : x.shape.last();
    const Block block{hadamard_size(size), kernels_->walsh};
    require(x.shape.last() % size == 0, "block_size is ", size, ", which does not divide ",
            x.shape.last(), ", the last axis of x");
    void* y = call.output(0, x.shape);
    if (x.type == Element::float16)
        transform_all<Half>(call, block, x, y);
    else
        transform_all<float>(call, block, x, y);
}

}  // namespace onnxq
