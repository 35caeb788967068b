// The product for the lattice with AVX-512 VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later): 64
// points at a time have their patterns looked up in registers, and bits become bytes by products of
// 8×8 matrices over GF(2).
#pragma once

#include <immintrin.h>

#include <cstring>

#include "integer_product.h"

namespace onnxq {
namespace {

class Avx512Lattice {
  public:
    static constexpr std::size_t vectors = 8;  // of a tile: one for each point of its rows

    explicit Avx512Lattice(const LatticeTables& tables) {
        for (int k = 0; k < 4; k++) {
            not_ones_[k] = _mm512_loadu_si512(tables.not_ones + 64 * k);
            not_twos_[k] = _mm512_loadu_si512(tables.not_twos + 64 * k);
        }
    }

    // n of a tile. Vector k has in quadword r the columns 8 k … 8 k + 7, of row r in the high
    // nibbles and of row r + 8 in the low ones.
    void decode(const std::uint8_t* tile, __m512i (&to)[vectors]) const {
        decode_half(tile, to);
        decode_half(tile + half_tile, to + vectors / 2);
    }

  private:
    using Table = __m512i[4];

    static __m512i look_up(const Table& table, __m512i index, __mmask64 upper) {
        return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], index, table[1]),
                                      _mm512_permutex2var_epi8(table[2], index, table[3]));
    }

    void decode_half(const std::uint8_t* half, __m512i* to) const {
        const __m512i pattern = _mm512_loadu_si512(half);
        const __m512i signs = _mm512_loadu_si512(half + signs_at);
        const __mmask64 upper = _mm512_movepi8_mask(pattern);
        const __m512i not_ones = look_up(not_ones_, pattern, upper);
        const __m512i not_twos = look_up(not_twos_, pattern, upper);

        // The bits of n in planes, a byte for each point. Parity, the product with a matrix of
        // ones, tells e; that turns the last of the signs.
        constexpr int xor_of_and_not = 0xd2;  // a ^ (~b & c)
        const __m512i last = _mm512_set1_epi8(-128);
        const __m512i mixed = _mm512_xor_si512(not_ones, signs);
        const __m512i bit0 = _mm512_gf2p8affine_epi64_epi8(mixed, _mm512_set1_epi64(-1), 0xff);
        const __m512i bit1 = _mm512_ternarylogic_epi64(mixed, bit0, last, xor_of_and_not);
        const __m512i bit3 = _mm512_ternarylogic_epi64(signs, bit0, last, xor_of_and_not);
        const __m512i bit2 = _mm512_xor_si512(not_twos, bit3);

        // The planes of two points are the rows of a matrix; its columns are their coordinates.
        const __m512i high0 = _mm512_unpacklo_epi8(bit3, bit2);
        const __m512i high1 = _mm512_unpackhi_epi8(bit3, bit2);
        const __m512i low0 = _mm512_unpacklo_epi8(bit1, bit0);
        const __m512i low1 = _mm512_unpackhi_epi8(bit1, bit0);
        to[0] = columns_of(_mm512_unpacklo_epi16(high0, low0));
        to[1] = columns_of(_mm512_unpackhi_epi16(high0, low0));
        to[2] = columns_of(_mm512_unpacklo_epi16(high1, low1));
        to[3] = columns_of(_mm512_unpackhi_epi16(high1, low1));
    }

    static __m512i columns_of(__m512i matrices) {
        const __m512i units = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
        return _mm512_gf2p8affine_epi64_epi8(units, matrices, 0);
    }

    Table not_ones_, not_twos_;
};

// Σ n · x of rows 0-7, times 16, and of rows 8-15; two lanes for each row.
struct LatticeSums {
    __m512 high = _mm512_setzero_ps(), low = _mm512_setzero_ps();

    void add(const __m512i (&n)[Avx512Lattice::vectors], const std::int8_t* x, float scale) {
        // High nibbles stay where they are: both together count 16 · high + low.
        const __m512i mask = _mm512_set1_epi8(-16);
        __m512i both_dots = _mm512_setzero_si512(), high_dots = both_dots;
        for (std::size_t k = 0; k < Avx512Lattice::vectors; k++) {
            long long eight;
            std::memcpy(&eight, x + point * k, sizeof eight);
            const __m512i codes = _mm512_set1_epi64(eight);
            both_dots = _mm512_dpbusd_epi32(both_dots, n[k], codes);
            high_dots = _mm512_dpbusd_epi32(high_dots, _mm512_and_si512(n[k], mask), codes);
        }
        const __m512i low_dots = _mm512_sub_epi32(both_dots, high_dots);
        const __m512 s = _mm512_set1_ps(scale);
        high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_dots), s, high);
        low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_dots), s, low);
    }

    void store(float (&to)[lattice_rows]) const {
        float lanes_of_high[16], lanes_of_low[16];
        _mm512_storeu_ps(lanes_of_high, high);
        _mm512_storeu_ps(lanes_of_low, low);
        for (std::size_t row = 0; row < 8; row++) {
            to[row] = (lanes_of_high[2 * row] + lanes_of_high[2 * row + 1]) / 16;
            to[row + 8] = lanes_of_low[2 * row] + lanes_of_low[2 * row + 1];
        }
    }
};

// Up to `most` rows of x with a group of 16 output channels. One row keeps its sums in registers.
template <std::size_t most>
void lattice_group(const Avx512Lattice& lattice, const LatticeWeights& weights,
                   const RoundedRows& x, const RowsOfTile& rows, std::size_t group,
                   const Output& out) {
    const std::size_t count = most == 1 ? 1 : rows.count;
    constexpr std::size_t ahead = 8;  // tiles: what is read reaches the L1 cache in time
    LatticeSums sums[most];
    for (std::size_t b = 0; b < weights.blocks; b++) {
        const std::uint8_t* tile = weights.tile(group, b);
        for (std::size_t line = 0; line < 2 * half_tile; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(tile + ahead * 2 * half_tile + line),
                         _MM_HINT_T0);
        __m512i n[Avx512Lattice::vectors];
        lattice.decode(tile, n);
        for (std::size_t m = 0; m < count; m++) {
            const std::size_t at = (rows.first + m) * x.blocks + b;
            sums[m].add(n, x.codes + at * lattice_columns, x.scales[at]);
        }
    }
    for (std::size_t m = 0; m < count; m++) {
        float of_channels[lattice_rows];
        sums[m].store(of_channels);
        store_lattice(weights, group, of_channels, rows.sums[m], rows.first + m, out);
    }
}

inline void avx512vbmi_lattice_product(const LatticeWeights& weights, const RoundedRows& x,
                                       Range rows, Range groups, const Output& out) {
    const Avx512Lattice lattice(*weights.tables);
    for (std::size_t first = rows.begin; first < rows.end; first += rows_of_tile) {
        const RowsOfTile of(x, first, rows.end);
        for (std::size_t group = groups.begin; group < groups.end; group++)
            if (of.count == 1)
                lattice_group<1>(lattice, weights, x, of, group, out);
            else
                lattice_group<rows_of_tile>(lattice, weights, x, of, group, out);
    }
}

}  // namespace
}  // namespace onnxq
