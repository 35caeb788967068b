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
    std::size_t bits = 4;
    // (channels, blocks, bits · block / 8): four bits, low half first; or three, the low two of all
    // codes of a block before their high ones.
    const std::uint8_t* codes = nullptr;
    Numbers scales, codebook, zero_points;

    unsigned code(std::size_t channel, std::size_t of_block, std::size_t k) const {
        const std::uint8_t* of = codes + (channel * blocks + of_block) * (block * bits / 8);
        if (bits == 4) return of[k / 2] >> (k % 2 * 4) & 15u;
        const unsigned low = of[k / 4] >> (k % 4 * 2) & 3u;
        return low | (of[block / 4 + k / 8] >> (k % 8) & 1u) << 2;
    }
    // Tables have room for 16 levels; codes of three bits reach the first eight.
    float level(std::size_t channel, std::size_t of_block, std::size_t index) const {
        return index >> bits ? 0.0f : codebook.at(channel, of_block, index);
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

// 16 channels from `first` on of weights of three bits, with four in `codes` (16, units, 16).
FloatWeights four_bits(const FloatWeights&, std::size_t first, std::uint8_t* codes);

}  // namespace onnxq
