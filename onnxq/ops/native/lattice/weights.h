// The E8P lattice of QuIP# (Tseng et al. 2024, §4.2): how its codes lie in memory for kernels.
//
// A point is eight coordinates w / 4, w odd in -11 … 11:
//
//     w = σ (4 t + 2) + e,   t in {0, 1, 2},   σ = ±1,   e = ±1 for all eight,
//
// and its code eight bits for the pattern of t, seven for signs and one for e. As 4 t + 2 negated
// is 4 (~t) + 2, the nibble n = (w + 15) / 2 in 2 … 13 has the bits
//
//     σ > 0,   t1 = (σ > 0),   t0 = (σ > 0),   e > 0.
//
// Each is a sum modulo 2 of bits of the code and of the pattern: a point decodes by XOR.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq {

inline constexpr std::size_t point = 8;             // coordinates
inline constexpr std::size_t lattice_rows = 16;     // output channels of a tile
inline constexpr std::size_t lattice_columns = 64;  // its input channels; x is rounded by as many
inline constexpr std::size_t half_tile = 128;       // bytes of 32 columns, see LatticeWeights
inline constexpr std::size_t signs_at = 64;
inline constexpr int lattice_offset = 15;           // w = 2 n - 15

struct LatticeTables {
    std::uint8_t not_ones[256], not_twos[256];  // of a pattern, bit j: its coordinate j has t ≠ 1, 2
    // XORed, the bytes n of a point. Bytes as memory has them: the first is the first coordinate.
    std::uint64_t pattern[256], signs[256];
};

// Tiles of 16 output by 64 input channels in 256 bytes: of each half, 64 bytes of patterns and 64
// of signs. A byte of signs has ones for plus, and its bit 7 turned where e < 0: the parity that E8P
// prescribes tells both. The order of points is that in which AVX-512's interleaving of bytes meets
// eight channels in eight quadwords, 0-7 in high nibbles and 8-15 in low ones.
struct LatticeWeights {
    std::size_t channels = 0, blocks = 0;
    const std::uint8_t* tiles = nullptr;  // [groups][blocks][2][128]
    const float* scales = nullptr;        // [16 · groups], 0 past the last channel
    const LatticeTables* tables = nullptr;

    std::size_t groups() const { return (channels + lattice_rows - 1) / lattice_rows; }
    const std::uint8_t* tile(std::size_t group, std::size_t block) const {
        return tiles + (group * blocks + block) * 2 * half_tile;
    }
    static constexpr std::size_t place(std::size_t row, std::size_t point_of_half) {
        return 16 * (row % 8 / 2) + 4 * point_of_half + 2 * (row % 2) + row / 8;
    }
    // The bytes n of one of eight points of a row of a tile.
    std::uint64_t nibbles(const std::uint8_t* tile, std::size_t row, std::size_t which) const {
        const std::uint8_t* at = tile + which / 4 * half_tile + place(row, which % 4);
        return tables->pattern[at[0]] ^ tables->signs[at[signs_at]];
    }
};

}  // namespace onnxq
