// y = x Wᵀ for weights of the lattice and x rounded to 8 bits, for any instruction set `Simd`:
//
//     y[m,n] = scales[n] / 4 · (2 Σ_b x.scales[m,b] Σ_k n · x.code − 15 Σ_b x.scales[m,b] Σ_k x.code)
//
// A tile is decoded once for up to 64 rows of x. Its bytes n fit instructions for signed and for
// unsigned bytes alike.
#pragma once

#include <cstring>

#include "kernels.h"

namespace onnxq {
namespace {

inline constexpr std::size_t rows_of_tile = 64;  // of x: their sums stay in the L1 cache

// Rows of x that share decoded tiles, and for each Σ_b x.scales[m,b] Σ_k x.code, which all output
// channels have in common.
struct RowsOfTile {
    std::size_t first, count;
    float sums[rows_of_tile];

    RowsOfTile(const RoundedRows& x, std::size_t first_row, std::size_t end_row)
        : first(first_row) {
        count = end_row - first < rows_of_tile ? end_row - first : rows_of_tile;
        for (std::size_t m = 0; m < count; m++) {
            const std::size_t row = (first + m) * x.blocks;
            sums[m] = 0;
            for (std::size_t b = 0; b < x.blocks; b++)
                sums[m] += x.scales[row + b] * static_cast<float>(x.sums[row + b]);
        }
    }
};

inline void store_lattice(const LatticeWeights& weights, std::size_t group, const float* sums,
                          float offset, std::size_t row, const Output& out) {
    const std::size_t first = group * lattice_rows;
    for (std::size_t n = first; n < weights.channels && n < first + lattice_rows; n++)
        out.y[row * out.stride + n] =
            weights.scales[n] * (0.5f * sums[n - first] - 0.25f * lattice_offset * offset) +
            (out.bias ? out.bias[n] : 0.0f);
}

// n of a tile, [column / 8][2][row][4]: lanes are rows, as Simd::dot has them.
inline void decode_tile(const LatticeWeights& weights, const std::uint8_t* tile,
                        std::uint8_t* to) {
    for (std::size_t k = 0; k < lattice_columns / point; k++, to += 128)
        for (std::size_t row = 0; row < lattice_rows; row++) {
            const std::uint64_t eight = weights.nibbles(tile, row, k);
            std::uint8_t bytes[point];
            std::memcpy(bytes, &eight, sizeof bytes);
            std::memcpy(to + 4 * row, bytes, 4);
            std::memcpy(to + 64 + 4 * row, bytes + 4, 4);
        }
}

template <class Simd>
inline typename Simd::Sums tile_product(const std::uint8_t* tile, const std::int8_t* x) {
    auto low = Simd::splat(std::int32_t{0}), high = low;
    for (std::size_t k = 0; k < lattice_columns; k += 8, tile += 128) {
        low = Simd::dot(low, Simd::load(tile), x + k);
        high = Simd::dot(high, Simd::load(tile + 64), x + k + 4);
    }
    return Simd::add(low, high);
}

template <class Simd>
void lattice_product(const LatticeWeights& weights, const RoundedRows& x, Range rows, Range groups,
                     const Output& out) {
    const std::size_t columns = x.blocks * lattice_columns;
    alignas(64) std::uint8_t tile[lattice_rows * lattice_columns];
    alignas(64) float sums[rows_of_tile][lattice_rows];
    for (std::size_t first = rows.begin; first < rows.end; first += rows_of_tile) {
        const RowsOfTile of(x, first, rows.end);
        for (std::size_t group = groups.begin; group < groups.end; group++) {
            for (std::size_t m = 0; m < of.count; m++) Simd::store(sums[m], Simd::splat(0.0f));
            for (std::size_t b = 0; b < weights.blocks; b++) {
                decode_tile(weights, weights.tile(group, b), tile);
                for (std::size_t m = 0; m < of.count; m++) {
                    const auto dots = tile_product<Simd>(
                        tile, x.codes + (first + m) * columns + b * lattice_columns);
                    const auto scale = Simd::splat(x.scales[(first + m) * x.blocks + b]);
                    Simd::store(sums[m],
                                Simd::fma(Simd::to_floats(dots), scale, Simd::load(sums[m])));
                }
            }
            for (std::size_t m = 0; m < of.count; m++)
                store_lattice(weights, group, sums[m], of.sums[m], first + m, out);
        }
    }
}

template <class Simd>
constexpr LatticeKernels lattice_kernels() {
    return {lattice_product<Simd>};
}

}  // namespace
}  // namespace onnxq
