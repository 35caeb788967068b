// y = x Wᵀ in integers: 8-bit levels times x rounded to 8 bits, for any instruction set `Simd`.
//
//     y[m,n] = Σ_b scales[n,b] · x.scales[m,b] · (Σ_k level · x.code − zero_point[n,b] · Σ_k x.code)
//
// 16 output channels are 16 lanes of a vector. Instructions that multiply unsigned by signed bytes
// are given level + 128 (Simd::bias), and 128 · Σ x.code is what the sum then begins without.
//
// Included by the files of isa/, each compiled for its own instruction set: all is local to them.
#pragma once

#include "weights.h"

namespace onnxq {
namespace {

// 128 codes: of 16 channels for columns 8 k8 … 8 k8 + 3, and for the next four.
template <class Simd, int bits>
inline void read_codes(const std::uint8_t* codes, std::size_t k8, typename Simd::Bytes& low,
                       typename Simd::Bytes& high) {
    if constexpr (bits == 3) {
        Simd::three_bits(codes + 48 * k8, low, high);
    } else {
        const auto both = Simd::load(codes + 64 * k8);
        low = Simd::low(both);
        high = Simd::high(both);
    }
}

// Levels by code, from a table that all 16 channels share.
template <class Simd, int bits>
class SharedLevels {
  public:
    SharedLevels(const IntegerWeights& weights, std::size_t)
        : table_(Simd::table(weights.tables)), codes_at_(weights.codes_at()) {}

    void open(const std::uint8_t* record) { codes_ = record + codes_at_; }
    void read(std::size_t k8, typename Simd::Bytes& low, typename Simd::Bytes& high) const {
        read_codes<Simd, bits>(codes_, k8, low, high);
        low = Simd::lookup(table_, low);
        high = Simd::lookup(table_, high);
    }

  private:
    typename Simd::Table table_;
    std::size_t codes_at_;
    const std::uint8_t* codes_ = nullptr;
};

// Levels by code, from a table for each of the 16 channels, which may change with every block.
template <class Simd, int bits>
class ChannelLevels {
  public:
    ChannelLevels(const IntegerWeights& weights, std::size_t group)
        : per_block_(weights.tables_are == IntegerWeights::Tables::per_block),
          tables_at_(weights.tables_at()), codes_at_(weights.codes_at()) {
        if (!per_block_)
            tables_ = Simd::tables(weights.tables + group * IntegerWeights::tables_bytes);
    }

    void open(const std::uint8_t* record) {
        codes_ = record + codes_at_;
        if (per_block_)
            tables_ = Simd::tables(reinterpret_cast<const std::int8_t*>(record + tables_at_));
    }
    void read(std::size_t k8, typename Simd::Bytes& low, typename Simd::Bytes& high) const {
        read_codes<Simd, bits>(codes_, k8, low, high);
        low = Simd::lookup(tables_, low);
        high = Simd::lookup(tables_, high);
    }

  private:
    bool per_block_;
    std::size_t tables_at_, codes_at_;
    typename Simd::Tables tables_;
    const std::uint8_t* codes_ = nullptr;
};

// Levels that were looked up before, [block / 8][2][64] a block.
template <class Simd>
class ReadyLevels {
  public:
    ReadyLevels(const std::uint8_t* panel, std::size_t block)
        : next_(panel), step_(block / 8 * 128) {}

    void open(const std::uint8_t*) {
        levels_ = next_;
        next_ += step_;
    }
    void read(std::size_t k8, typename Simd::Bytes& low, typename Simd::Bytes& high) const {
        low = Simd::load(levels_ + 128 * k8);
        high = Simd::load(levels_ + 128 * k8 + 64);
    }

  private:
    const std::uint8_t *next_, *levels_ = nullptr;
    std::size_t step_;
};

// Some blocks of 16 output channels for `count` rows of x, added to `totals`.
template <class Simd, int count, class Levels>
inline void add_blocks(const IntegerWeights& weights, const RoundedRows& x, std::size_t row,
                       std::size_t group, Range blocks, Levels levels,
                       typename Simd::Floats (&totals)[count]) {
    const std::size_t columns = x.blocks * x.block;
    for (std::size_t b = blocks.begin; b < blocks.end; b++) {
        const std::uint8_t* record = weights.record(group, b);
        levels.open(record);
        const std::int8_t* codes[count];
        typename Simd::Sums sums[count], more[count];
        for (int m = 0; m < count; m++) {
            codes[m] = x.codes + (row + m) * columns + b * x.block;
            sums[m] = Simd::splat(-Simd::bias * x.sums[(row + m) * x.blocks + b]);
            if (count == 1) more[m] = Simd::splat(std::int32_t{0});
        }
        for (std::size_t k8 = 0; k8 < x.block / 8; k8++) {
            typename Simd::Bytes low, high;
            levels.read(k8, low, high);
            for (int m = 0; m < count; m++) {
                sums[m] = Simd::dot(sums[m], low, codes[m] + 8 * k8);
                // A single row has but one chain of sums: two are twice as fast.
                auto& second = count == 1 ? more[m] : sums[m];
                second = Simd::dot(second, high, codes[m] + 8 * k8 + 4);
            }
        }
        const auto scales = Simd::load(reinterpret_cast<const float*>(record));
        for (int m = 0; m < count; m++) {
            const std::size_t at = (row + m) * x.blocks + b;
            auto product = Simd::to_floats(count == 1 ? Simd::add(sums[m], more[m]) : sums[m]);
            if (weights.has_zero_points) {
                const auto zero_points = Simd::load(
                    reinterpret_cast<const float*>(record + weights.zero_points_at()));
                product = Simd::fma(zero_points, Simd::splat(-static_cast<float>(x.sums[at])),
                                    product);
            }
            totals[m] = Simd::fma(product, Simd::multiply(scales, Simd::splat(x.scales[at])),
                                  totals[m]);
        }
    }
}

// The lanes of a group that are channels; the last group may have fewer than 16.
inline std::size_t channels_of(const IntegerWeights& weights, std::size_t group) {
    const std::size_t left = weights.channels - group * lanes;
    return left < lanes ? left : lanes;
}

template <class Simd>
inline typename Simd::Floats load_some(const float* from, std::size_t count) {
    if (count == lanes) return Simd::load(from);
    float copy[lanes] = {};
    for (std::size_t lane = 0; lane < count; lane++) copy[lane] = from[lane];
    return Simd::load(copy);
}

template <class Simd>
inline void store_some(float* to, std::size_t count, typename Simd::Floats value) {
    if (count == lanes) return Simd::store(to, value);
    float copy[lanes];
    Simd::store(copy, value);
    for (std::size_t lane = 0; lane < count; lane++) to[lane] = copy[lane];
}

// Some blocks of a group for `count` rows: from the first block on y begins with the bias, later
// ones add to it.
template <class Simd, int count, class Levels>
void product_of_rows(const IntegerWeights& weights, const RoundedRows& x, std::size_t row,
                     std::size_t group, Range blocks, const Levels& levels, const Output& out) {
    const std::size_t width = channels_of(weights, group);
    float* y = out.y + group * lanes;
    typename Simd::Floats totals[count];
    for (int m = 0; m < count; m++) {
        if (blocks.begin > 0)
            totals[m] = load_some<Simd>(y + (row + m) * out.stride, width);
        else if (out.bias)
            totals[m] = load_some<Simd>(out.bias + group * lanes, width);
        else
            totals[m] = Simd::splat(0.0f);
    }
    add_blocks<Simd, count>(weights, x, row, group, blocks, levels, totals);
    for (int m = 0; m < count; m++)
        store_some<Simd>(y + (row + m) * out.stride, width, totals[m]);
}

// As many rows at a time as registers hold sums of, then the rest, each count a loop of its own.
template <class Simd, int count, class Levels>
void product_of_all_rows(const IntegerWeights& weights, const RoundedRows& x, Range rows,
                         std::size_t group, Range blocks, const Levels& levels,
                         const Output& out) {
    for (; rows.size() >= count; rows.begin += count)
        product_of_rows<Simd, count>(weights, x, rows.begin, group, blocks, levels, out);
    if constexpr (count > 1)
        if (rows.size())
            product_of_all_rows<Simd, count - 1>(weights, x, rows, group, blocks, levels, out);
}

// Looks the levels of some blocks up once, for many rows of x.
template <class Simd, class Levels>
void unpack(const IntegerWeights& weights, std::size_t group, Range blocks, Levels levels,
            std::uint8_t* panel) {
    for (std::size_t b = blocks.begin; b < blocks.end; b++) {
        levels.open(weights.record(group, b));
        for (std::size_t k8 = 0; k8 < weights.block / 8; k8++, panel += 128) {
            typename Simd::Bytes low, high;
            levels.read(k8, low, high);
            Simd::store(panel, low);
            Simd::store(panel + 64, high);
        }
    }
}

inline constexpr std::size_t panel_columns = 4096;  // a panel of 64 KiB stays in the L2 cache

template <class Simd, class Levels>
void integer_product_with(const IntegerWeights& weights, const RoundedRows& x, Range rows,
                          Range groups, const Output& out) {
    constexpr int tile = Simd::integer_rows;
    const std::size_t blocks_of_panel = panel_columns / weights.block;
    for (std::size_t group = groups.begin; group < groups.end; group++) {
        const Levels levels(weights, group);
        if (rows.size() <= tile) {
            product_of_all_rows<Simd, tile>(weights, x, rows, group, {0, weights.blocks}, levels,
                                            out);
            continue;
        }
        alignas(64) std::uint8_t panel[panel_columns * lanes];
        for (std::size_t b = 0; b < weights.blocks; b += blocks_of_panel) {
            const std::size_t left = weights.blocks - b;
            const Range blocks{b, b + (left < blocks_of_panel ? left : blocks_of_panel)};
            unpack<Simd>(weights, group, blocks, levels, panel);
            product_of_all_rows<Simd, tile>(weights, x, rows, group, blocks,
                                            ReadyLevels<Simd>(panel, weights.block), out);
        }
    }
}

template <class Simd, int bits>
void integer_product_of(const IntegerWeights& weights, const RoundedRows& x, Range rows,
                        Range groups, const Output& out) {
    if (weights.tables_are == IntegerWeights::Tables::one)
        integer_product_with<Simd, SharedLevels<Simd, bits>>(weights, x, rows, groups, out);
    else
        integer_product_with<Simd, ChannelLevels<Simd, bits>>(weights, x, rows, groups, out);
}

template <class Simd>
void integer_product(const IntegerWeights& weights, const RoundedRows& x, Range rows, Range groups,
                     const Output& out) {
    if (weights.bits == 3)
        integer_product_of<Simd, 3>(weights, x, rows, groups, out);
    else
        integer_product_of<Simd, 4>(weights, x, rows, groups, out);
}

}  // namespace
}  // namespace onnxq
