// From the operands of MatMulCodebook to the arrangements that kernels read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../half.h"
#include "../scratch.h"
#include "weights.h"

namespace onnxq {

// Numbers of any of the types that scales, zero points and codebooks have, by channel and block.
struct Numbers {
    enum class Type { none, float32, float16, int8 } type = Type::none;
    const void* data = nullptr;
    std::size_t per_channel = 0, per_block = 0;  // strides in numbers; 0: the same for all

    explicit operator bool() const { return type != Type::none; }
    float at(std::size_t channel, std::size_t block, std::size_t index = 0) const {
        const std::size_t place = channel * per_channel + block * per_block + index;
        switch (type) {
            case Type::float32: return static_cast<const float*>(data)[place];
            case Type::float16: return to_float(static_cast<const Half*>(data)[place]);
            case Type::int8: return static_cast<const std::int8_t*>(data)[place];
            case Type::none: break;
        }
        return 0;
    }
};

// W as a model has it.
struct CodebookMatrix {
    std::size_t channels = 0, block = 0, blocks = 0;
    const std::uint8_t* codes = nullptr;  // (channels, blocks, block / 2), low half first
    Numbers scales, codebook, zero_points;

    std::size_t code(std::size_t channel, std::size_t of_block, std::size_t k) const {
        const std::size_t byte = (channel * blocks + of_block) * (block / 2) + k / 2;
        return codes[byte] >> (k % 2 * 4) & 15;
    }
};

class PackedIntegerWeights {
  public:
    explicit PackedIntegerWeights(const CodebookMatrix&);  // its codebook is of int8
    const IntegerWeights& weights() const { return weights_; }

  private:
    IntegerWeights weights_;
    AlignedBuffer tables_, records_;
};

class PackedFloatWeights {
  public:
    explicit PackedFloatWeights(const CodebookMatrix&);
    const FloatWeights& weights() const { return weights_; }

  private:
    FloatWeights weights_;
    AlignedBuffer codes_;
    std::vector<float> scales_, offsets_, tables_;
};

}  // namespace onnxq
