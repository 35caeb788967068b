// Weights of MatMulCodebook in the two arrangements that kernels read, and the rows of x.
//
//     W[n,k] = scales[n,b] · (codebook[n,b,codes[n,k]] − zero_points[n,b]),   b = ⌊k / block⌋
//
// Plain structures of pointers: files that are compiled for one instruction set include this, and
// must not make code that others could be linked with.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq {

inline constexpr std::size_t levels = 16;       // of a codebook
inline constexpr std::size_t lanes = 16;        // output channels side by side, floats of a vector
inline constexpr std::size_t few_rows = 8;      // of x: float products look levels up on the way
inline constexpr std::size_t most_block = 256;  // input channels that share a scale

// For products of integers: 16 output channels side by side, a lane each, so that no sum ever
// crosses lanes. Everything that a block of 16 channels needs is one record, and a kernel reads
// records from first to last, one stream of memory:
//
//     float  scales[16]
//     float  zero_points[16]       if has_zero_points
//     int8   tables[4][4][16]      if the codebook is one per block
//     uint8  codes[block / 8][64]  byte 4·lane + i: code of k + i, and in its high half k + 4 + i
//
// Codes of three bits take 48 bytes for each eight columns. The code that would be in byte i of 64,
// in its half h, has its low two bits in byte i mod 32, from bit 4·h + 2·⌊i / 32⌋ on, and the other
// in byte 32 + i mod 16, bit 4·h + ⌊i / 16⌋.
//
// Vectors look levels up within 16 bytes, which are four channels. Where each channel has levels of
// its own, tables[j][i] are those of channel 4·i + j: the levels of every fourth channel at once.
struct IntegerWeights {
    std::size_t channels = 0, block = 0, blocks = 0;
    std::size_t bits = 4;  // of a code: 3 or 4
    bool has_zero_points = false;
    enum class Tables { one, per_channel, per_block } tables_are = Tables::one;
    const std::int8_t* tables = nullptr;    // [16], or [groups][256]
    const std::uint8_t* records = nullptr;  // [groups][blocks][record_bytes]

    static constexpr std::size_t tables_bytes = lanes * levels;

    std::size_t groups() const { return (channels + lanes - 1) / lanes; }
    std::size_t zero_points_at() const { return lanes * sizeof(float); }
    std::size_t tables_at() const { return zero_points_at() * (has_zero_points ? 2 : 1); }
    std::size_t codes_at() const {
        return tables_at() + (tables_are == Tables::per_block ? tables_bytes : 0);
    }
    std::size_t record_bytes() const { return codes_at() + block * 2 * bits; }
    const std::uint8_t* record(std::size_t group, std::size_t of_block) const {
        return records + (group * blocks + of_block) * record_bytes();
    }
};

// For products of floats: each output channel by itself, 32 codes in 16 bytes: byte i holds the
// code of k + i, and in its high half that of k + 16 + i. A level is a lane of a register then,
// which a permutation looks up, 16 at a time.
//
// Codes of three bits take 12 bytes for each 32, and become four before they are looked up. The
// code whose half h of byte i of 16 it would be has its low two bits in byte i mod 8, from bit
// 4·h + 2·⌊i / 8⌋ on, and the other in byte 8 + i mod 4, bit 4·h + ⌊i / 4⌋.
struct FloatWeights {
    std::size_t channels = 0, block = 0, blocks = 0;
    std::size_t bits = 4;                 // of a code: 3 or 4
    const std::uint8_t* codes = nullptr;  // [channels][units][16 or 12]
    const float* scales = nullptr;        // [channels][blocks]
    const float* offsets = nullptr;       // [channels][blocks], scale · zero point, or null
    const float* tables = nullptr;        // [1 or channels][1 or blocks][16]
    std::size_t table_stride = 0;         // floats from channel to channel, 0: all the same
    std::size_t block_table_stride = 0;   // floats from block to block

    std::size_t units() const { return (blocks * block + 31) / 32; }
    std::size_t columns() const { return units() * 32; }
    const float* table(std::size_t channel, std::size_t of_block) const {
        return tables + channel * table_stride + of_block * block_table_stride;
    }
};

// Rows of x in 8 bits: x ≈ scales · codes, a scale for each row and block, |codes| ≤ 127.
struct RoundedRows {
    std::size_t block = 0, blocks = 0;
    std::int8_t* codes = nullptr;  // [rows][blocks · block]
    float* scales = nullptr;       // [rows][blocks]
    std::int32_t* sums = nullptr;  // [rows][blocks], of codes
};

// Rows of x with zeros to the end of the last unit.
struct FloatRows {
    const float* x = nullptr;
    std::size_t stride = 0;       // floats from row to row
    const float* sums = nullptr;  // [rows][blocks], of x; given for few_rows and offsets
};

struct Range {
    std::size_t begin = 0, end = 0;
    std::size_t size() const { return end - begin; }
};

// y[row · stride + channel] = Σ + bias[channel].
struct Output {
    float* y = nullptr;
    std::size_t stride = 0;
    const float* bias = nullptr;  // [channels] or null
};

}  // namespace onnxq
