// Vectors of 16 lanes in plain C++: what every other file of this folder must agree with, and the
// names that they all have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnxq {
namespace {

struct Portable {
    static constexpr int bias = 0;           // added to levels before dot multiplies them
    static constexpr int integer_rows = 4;   // of x at a time, in product of integers
    static constexpr int float_rows = 2;     // and of floats,
    static constexpr int float_channels = 2; // with as many output channels at a time

    template <class T, int count>
    struct Vector {
        T lane[count];
    };
    using Bytes = Vector<std::int8_t, 64>;  // 16 lanes of 4 bytes
    using Sums = Vector<std::int32_t, 16>;
    using Floats = Vector<float, 16>;
    using Table = Vector<std::int8_t, 16>;          // a level for each code
    using Tables = Vector<std::int8_t, 4 * 4 * 16>; // 16 of them, see IntegerWeights
    using Unit = Vector<std::uint8_t, 16>;          // 32 codes, see FloatWeights
    using FloatTable = const float*;                // a level for each code

    template <class Result, class Body>
    static Result each(Body body) {
        Result result;
        for (std::size_t i = 0; i < sizeof result.lane / sizeof *result.lane; i++)
            result.lane[i] = body(i);
        return result;
    }

    // 64 bytes of codes, and the levels of their low and high halves.
    static Bytes load(const std::uint8_t* from) {
        Bytes bytes;
        std::memcpy(bytes.lane, from, sizeof bytes.lane);
        return bytes;
    }
    static void store(std::uint8_t* to, Bytes bytes) {
        std::memcpy(to, bytes.lane, sizeof bytes.lane);
    }
    static Bytes low(Bytes codes) {
        return each<Bytes>([&](auto i) { return static_cast<std::int8_t>(codes.lane[i] & 15); });
    }
    static Bytes high(Bytes codes) {
        return each<Bytes>(
            [&](auto i) { return static_cast<std::int8_t>(codes.lane[i] >> 4 & 15); });
    }
    // 128 codes of three bits in 48 bytes, see IntegerWeights.
    static void three_bits(const std::uint8_t* from, Bytes& low, Bytes& high) {
        for (int i = 0; i < 64; i++) {
            const int two = from[i % 32] >> (2 * (i / 32)), one = from[32 + i % 16] >> (i / 16);
            low.lane[i] = static_cast<std::int8_t>((two & 3) | (one & 1) << 2);
            high.lane[i] = static_cast<std::int8_t>((two >> 4 & 3) | (one >> 4 & 1) << 2);
        }
    }
    static Table table(const std::int8_t* levels) {
        return each<Table>([&](auto i) { return levels[i]; });
    }
    static Tables tables(const std::int8_t* levels) {
        return each<Tables>([&](auto i) { return levels[i]; });
    }
    static Bytes lookup(const Table& table, const Bytes& codes) {
        return each<Bytes>([&](auto i) { return table.lane[codes.lane[i]]; });
    }
    static Bytes lookup(const Tables& tables, const Bytes& codes) {
        return each<Bytes>([&](auto i) {
            const auto channel = i / 4;
            return tables.lane[64 * (channel % 4) + 16 * (channel / 4) + codes.lane[i]];
        });
    }

    // Adds to each lane the product of its four bytes with the four of x.
    static Sums dot(Sums sums, const Bytes& w, const std::int8_t* x) {
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 4; j++) sums.lane[i] += w.lane[4 * i + j] * x[j];
        return sums;
    }
    static Sums splat(std::int32_t value) {
        return each<Sums>([&](auto) { return value; });
    }
    static Sums add(Sums a, Sums b) {
        return each<Sums>([&](auto i) { return a.lane[i] + b.lane[i]; });
    }
    static std::int32_t sum_of(Sums sums) {
        std::int32_t total = 0;
        for (std::int32_t value : sums.lane) total += value;
        return total;
    }
    static Floats to_floats(Sums sums) {
        return each<Floats>([&](auto i) { return static_cast<float>(sums.lane[i]); });
    }

    static Floats load(const float* from) {
        return each<Floats>([&](auto i) { return from[i]; });
    }
    static void store(float* to, Floats value) { std::memcpy(to, value.lane, sizeof value.lane); }
    static Floats splat(float value) {
        return each<Floats>([&](auto) { return value; });
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        return each<Floats>([&](auto i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static Floats multiply(Floats a, Floats b) {
        return each<Floats>([&](auto i) { return a.lane[i] * b.lane[i]; });
    }
    static Floats divide(Floats a, Floats b) {
        return each<Floats>([&](auto i) { return a.lane[i] / b.lane[i]; });
    }
    static float sum_of(Floats value) {
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; i++) value.lane[i] += value.lane[i + half];
        return value.lane[0];
    }
    static Floats larger_magnitude(Floats largest, Floats value) {
        return each<Floats>([&](auto i) {
            const float magnitude = value.lane[i] < 0 ? -value.lane[i] : value.lane[i];
            return magnitude > largest.lane[i] ? magnitude : largest.lane[i];
        });
    }
    static float largest_of(Floats value) {
        float largest = 0;
        for (float each : value.lane) largest = each > largest ? each : largest;
        return largest;
    }
    // Half to even; what is not a number gives any code.
    static Sums round_to_127(Floats value) {
        return each<Sums>([&](auto i) {
            const float magic = 12582912.0f;  // 1.5 · 2^23, where the unit is 1
            float clipped = value.lane[i] > -127.0f ? value.lane[i] : -127.0f;
            clipped = clipped < 127.0f ? clipped : 127.0f;
            const float rounded = clipped + magic;
            return static_cast<std::int32_t>(rounded - magic);
        });
    }
    static void store_low_bytes(std::int8_t* to, Sums value) {
        for (int i = 0; i < 16; i++) to[i] = static_cast<std::int8_t>(value.lane[i]);
    }

    static Unit load_unit(const std::uint8_t* from) {
        return each<Unit>([&](auto i) { return from[i]; });
    }
    static FloatTable float_table(const float* levels) { return levels; }
    static Floats lookup_low(FloatTable table, Unit unit) {
        return each<Floats>([&](auto i) { return table[unit.lane[i] & 15]; });
    }
    static Floats lookup_high(FloatTable table, Unit unit) {
        return each<Floats>([&](auto i) { return table[unit.lane[i] >> 4]; });
    }
};

}  // namespace
}  // namespace onnxq
