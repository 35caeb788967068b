#include "pack.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace onnxq {
namespace {

bool odd(unsigned byte) {
    byte ^= byte >> 4;
    byte ^= byte >> 2;
    return (byte ^ byte >> 1) & 1;
}

struct Pattern {
    unsigned ones = 0, twos = 0;  // bit j: coordinate j has t = 1, t = 2
};

// S: the 227 patterns with |s|² ≤ 10 and then 29 of those with |s|² = 12, evenly chosen; both in
// lexicographic order, as onnxq/lattice.py numbers them.
std::vector<Pattern> patterns() {
    std::vector<Pattern> found, longer;
    for (int number = 0; number < 6561; number++) {
        Pattern pattern;
        int length = 2;  // |s|² = Σ (t + 1/2)² = 2 + Σ t (t + 1)
        for (int j = point - 1, rest = number; j >= 0; j--, rest /= 3) {
            const int t = rest % 3;
            if (t == 1) pattern.ones |= 1u << j;
            if (t == 2) pattern.twos |= 1u << j;
            length += t * (t + 1);
        }
        if (length <= 10) found.push_back(pattern);
        if (length == 12) longer.push_back(pattern);
    }
    const std::size_t missing = 256 - found.size();
    const double step = static_cast<double>(longer.size() - 1) / static_cast<double>(missing - 1);
    for (std::size_t k = 0; k < missing; k++)
        found.push_back(longer[std::lround(std::nearbyint(static_cast<double>(k) * step))]);
    return found;
}

LatticeTables make_tables() {
    constexpr std::uint8_t e_bit = 1, sign_bits = 14;  // of n: those that e and σ turn
    LatticeTables tables{};
    const std::vector<Pattern> all = patterns();
    for (unsigned k = 0; k < 256; k++) {
        const Pattern& p = all[k];
        tables.not_ones[k] = static_cast<std::uint8_t>(~p.ones);
        tables.not_twos[k] = static_cast<std::uint8_t>(~p.twos);
        std::uint8_t pattern[point], signs[point];
        for (unsigned j = 0; j < point; j++) {
            const bool plus = k >> j & 1;
            pattern[j] = static_cast<std::uint8_t>((p.ones >> j & 1) << 1 | (p.twos >> j & 1) << 2);
            signs[j] = e_bit | (plus ? 8 : 6);
            // Where pattern and signs differ in parity, e < 0, and the last sign was turned.
            const std::uint8_t turned = j == point - 1 ? e_bit | sign_bits : e_bit;
            if (odd(p.ones)) pattern[j] ^= turned;
            if (odd(k)) signs[j] ^= turned;
        }
        std::memcpy(&tables.pattern[k], pattern, sizeof pattern);
        std::memcpy(&tables.signs[k], signs, sizeof signs);
    }
    return tables;
}

const LatticeTables& tables() {
    static const LatticeTables made = make_tables();
    return made;
}

std::uint8_t signs_of(unsigned code) {
    const unsigned pattern = code >> 8, minus = code >> 1 & 0x7f, e = code & 1;
    const bool last = odd(minus) != odd(tables().not_ones[pattern]);
    return static_cast<std::uint8_t>(~(minus | unsigned{last} << 7) ^ e << 7);
}

}  // namespace

PackedLattice::PackedLattice(const std::uint16_t* codes, std::size_t channels, std::size_t points,
                             const Numbers& scales) {
    constexpr std::size_t points_of_tile = lattice_columns / point, points_of_half = 4;
    weights_.channels = channels;
    weights_.blocks = (points + points_of_tile - 1) / points_of_tile;
    weights_.tables = &tables();
    tiles_ = AlignedBuffer(weights_.groups() * weights_.blocks * 2 * half_tile);
    std::memset(tiles_.data(), 0, tiles_.size());
    weights_.tiles = tiles_.as<std::uint8_t>();
    scales_.resize(weights_.groups() * lattice_rows);
    weights_.scales = scales_.data();
    for (std::size_t n = 0; n < channels; n++) {
        scales_[n] = scales.at(n, 0);
        const std::size_t group = n / lattice_rows, row = n % lattice_rows;
        for (std::size_t k = 0; k < points; k++) {
            const unsigned code = codes[n * points + k];
            const std::size_t in_tile = k % points_of_tile;
            std::uint8_t* at = tiles_.as<std::uint8_t>() +
                               (weights_.tile(group, k / points_of_tile) - weights_.tiles) +
                               in_tile / points_of_half * half_tile +
                               LatticeWeights::place(row, in_tile % points_of_half);
            at[0] = static_cast<std::uint8_t>(code >> 8);
            at[signs_at] = signs_of(code);
        }
    }
}

FloatWeights lattice_as_codebook(const LatticeWeights& weights, std::size_t group,
                                 std::uint8_t* codes, float* scales) {
    static const std::array<float, levels> coordinates = [] {
        std::array<float, levels> made{};
        for (std::size_t n = 0; n < levels; n++)
            made[n] = static_cast<float>(2 * static_cast<int>(n) - lattice_offset) / 4;
        return made;
    }();
    const std::size_t first = group * lattice_rows;
    std::uint8_t* to = codes;
    for (std::size_t row = 0; row < lattice_rows; row++)
        for (std::size_t b = 0; b < weights.blocks; b++) {
            const std::uint8_t* tile = weights.tile(group, b);
            for (std::size_t k = 0; k < 8; k += 4, to += 16)  // a unit of 32 codes
                for (std::size_t i = 0; i < 2; i++) {
                    const std::uint64_t eight = weights.nibbles(tile, row, k + i) |
                                                weights.nibbles(tile, row, k + 2 + i) << 4;
                    std::memcpy(to + point * i, &eight, sizeof eight);
                }
        }
    for (std::size_t row = 0; row < lattice_rows; row++)
        std::fill_n(scales + row * weights.blocks, weights.blocks, weights.scales[first + row]);
    FloatWeights result;
    result.channels = std::min(lattice_rows, weights.channels - first);
    result.block = lattice_columns;
    result.blocks = weights.blocks;
    result.codes = codes;
    result.scales = scales;
    result.tables = coordinates.data();
    return result;
}

}  // namespace onnxq
