#include "pack.h"

#include <algorithm>
#include <cstring>

namespace onnxq {

namespace {

// tables[j][i] of 16 channels, see IntegerWeights; channels past the last have levels 0.
void pack_tables(const CodebookMatrix& w, std::size_t group, std::size_t block, std::int8_t* to) {
    for (std::size_t lane = 0; lane < lanes; lane++) {
        const std::size_t channel = group * lanes + lane;
        std::int8_t* table = to + 64 * (lane % 4) + 16 * (lane / 4);
        for (std::size_t i = 0; i < levels; i++)
            table[i] = channel < w.channels
                           ? static_cast<std::int8_t>(w.level(channel, block, i))
                           : std::int8_t{0};
    }
}

void put(std::uint8_t& byte, unsigned bits, std::size_t place) {
    byte = static_cast<std::uint8_t>(byte | bits << place);
}

// Codes of one channel in a record, see IntegerWeights.
void pack_codes(const CodebookMatrix& w, std::size_t channel, std::size_t block, std::size_t lane,
                std::uint8_t* to) {
    for (std::size_t k = 0; k < w.block; k++) {
        const unsigned code = w.code(channel, block, k);
        const std::size_t half = k / 4 % 2, i = 4 * lane + k % 4;
        std::uint8_t* of_eight = to + k / 8 * 16 * w.bits;
        if (w.bits == 4) {
            put(of_eight[i], code, 4 * half);
        } else {
            put(of_eight[i % 32], code & 3, 4 * half + 2 * (i / 32));
            put(of_eight[32 + i % 16], code >> 2, 4 * half + i / 16);
        }
    }
}

// Codes of one channel as FloatWeights has them.
void pack_units(const CodebookMatrix& w, std::size_t channel, std::uint8_t* to) {
    for (std::size_t k = 0; k < w.blocks * w.block; k++) {
        const unsigned code = w.code(channel, k / w.block, k % w.block);
        const std::size_t half = k / 16 % 2, i = k % 16;
        std::uint8_t* unit = to + k / 32 * 4 * w.bits;
        if (w.bits == 4) {
            put(unit[i], code, 4 * half);
        } else {
            put(unit[i % 8], code & 3, 4 * half + 2 * (i / 8));
            put(unit[8 + i % 4], code >> 2, 4 * half + i / 4);
        }
    }
}

}  // namespace

PackedIntegerWeights::PackedIntegerWeights(const CodebookMatrix& w) {
    using Tables = IntegerWeights::Tables;
    weights_.channels = w.channels;
    weights_.block = w.block;
    weights_.blocks = w.blocks;
    weights_.bits = w.bits;
    weights_.has_zero_points = static_cast<bool>(w.zero_points);
    weights_.tables_are = w.codebook.per_block     ? Tables::per_block
                          : w.codebook.per_channel ? Tables::per_channel
                                                   : Tables::one;
    const std::size_t groups = weights_.groups();
    if (weights_.tables_are == Tables::one) {
        tables_ = AlignedBuffer(levels);
        for (std::size_t i = 0; i < levels; i++)
            tables_.as<std::int8_t>()[i] = static_cast<std::int8_t>(w.level(0, 0, i));
    } else if (weights_.tables_are == Tables::per_channel) {
        tables_ = AlignedBuffer(groups * IntegerWeights::tables_bytes);
        for (std::size_t group = 0; group < groups; group++)
            pack_tables(w, group, 0,
                        tables_.as<std::int8_t>(group * IntegerWeights::tables_bytes));
    }
    weights_.tables = tables_.as<std::int8_t>();
    records_ = AlignedBuffer(groups * w.blocks * weights_.record_bytes());
    weights_.records = records_.as<std::uint8_t>();
    std::memset(records_.data(), 0, records_.size());
    for (std::size_t group = 0; group < groups; group++)
        for (std::size_t b = 0; b < w.blocks; b++) {
            auto* record =
                records_.as<std::uint8_t>((group * w.blocks + b) * weights_.record_bytes());
            auto* scales = reinterpret_cast<float*>(record);
            auto* zero_points = reinterpret_cast<float*>(record + weights_.zero_points_at());
            if (weights_.tables_are == Tables::per_block)
                pack_tables(w, group, b,
                            reinterpret_cast<std::int8_t*>(record + weights_.tables_at()));
            const std::size_t first = group * lanes;
            for (std::size_t lane = 0; lane < std::min(lanes, w.channels - first); lane++) {
                scales[lane] = w.scales.at(first + lane, b);
                if (w.zero_points) zero_points[lane] = w.zero_points.at(first + lane, b);
                pack_codes(w, first + lane, b, lane, record + weights_.codes_at());
            }
        }
}

PackedFloatWeights::PackedFloatWeights(const CodebookMatrix& w) {
    weights_.channels = w.channels;
    weights_.block = w.block;
    weights_.blocks = w.blocks;
    weights_.bits = w.bits;
    const std::size_t code_bytes = weights_.units() * 4 * w.bits;
    codes_ = AlignedBuffer(w.channels * code_bytes);
    std::memset(codes_.data(), 0, codes_.size());
    for (std::size_t n = 0; n < w.channels; n++)
        pack_units(w, n, codes_.as<std::uint8_t>(n * code_bytes));

    scales_.resize(w.channels * w.blocks);
    offsets_.resize(w.zero_points ? w.channels * w.blocks : 0);
    for (std::size_t n = 0; n < w.channels; n++)
        for (std::size_t b = 0; b < w.blocks; b++) {
            const std::size_t at = n * w.blocks + b;
            scales_[at] = w.scales.at(n, b);
            if (w.zero_points) offsets_[at] = scales_[at] * w.zero_points.at(n, b);
        }

    const std::size_t table_rows = w.codebook.per_channel ? w.channels : 1;
    const std::size_t table_blocks = w.codebook.per_block ? w.blocks : 1;
    for (std::size_t n = 0; n < table_rows; n++)
        for (std::size_t b = 0; b < table_blocks; b++)
            for (std::size_t i = 0; i < levels; i++) tables_.push_back(w.level(n, b, i));

    weights_.codes = codes_.as<std::uint8_t>();
    weights_.scales = scales_.data();
    weights_.offsets = w.zero_points ? offsets_.data() : nullptr;
    weights_.tables = tables_.data();
    weights_.block_table_stride = table_blocks > 1 ? levels : 0;
    weights_.table_stride = table_rows > 1 ? table_blocks * levels : 0;
}

FloatWeights four_bits(const FloatWeights& weights, std::size_t first, std::uint8_t* codes) {
    constexpr std::size_t bytes_of_unit = 12;
    constexpr std::uint64_t two_of_four = 0x3333333333333333, one_of_four = 0x1111111111111111;
    FloatWeights result = weights;
    result.bits = 4;
    result.channels = std::min(lanes, weights.channels - first);
    result.codes = codes;
    result.scales += first * weights.blocks;
    if (weights.offsets) result.offsets += first * weights.blocks;
    result.tables += first * weights.table_stride;
    const std::uint8_t* from = weights.codes + first * weights.units() * bytes_of_unit;
    for (std::size_t unit = 0; unit < result.channels * weights.units(); unit++) {
        std::uint64_t low, high = 0;
        std::memcpy(&low, from, 8);
        std::memcpy(&high, from + 8, 4);
        high |= high << 31;  // bytes 4 to 7 have their bits one place higher
        const std::uint64_t first_eight = (low & two_of_four) | (high & one_of_four) << 2;
        const std::uint64_t last_eight =
            (low >> 2 & two_of_four) | (high >> 2 & one_of_four) << 2;
        std::memcpy(codes, &first_eight, 8);
        std::memcpy(codes + 8, &last_eight, 8);
        from += bytes_of_unit;
        codes += 16;
    }
    return result;
}

}  // namespace onnxq
