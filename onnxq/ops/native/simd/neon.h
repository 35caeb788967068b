// 16 lanes in four 128-bit registers. Products of bytes by smull, or by sdot where CPUs have it.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnxq {
namespace {

struct ProductsByMull {
    // Two products of bytes fit 16 bits: 2 · 128 · 127 < 2^15.
    static int32x4_t dot(int32x4_t sums, int8x16_t w, int8x16_t x) {
        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        const int16x8_t high = vmull_high_s8(w, x);
        return vpadalq_s16(sums, vpaddq_s16(low, high));
    }
};

template <class Products>
struct NeonOf {
    static constexpr int bias = 0;
    static constexpr int integer_rows = 4, float_rows = 2, float_channels = 2;
    static constexpr int parts = 4;

    struct Bytes {
        int8x16_t part[parts];
    };
    struct Sums {
        int32x4_t part[parts];
    };
    struct Floats {
        float32x4_t part[parts];
    };
    struct Table {
        int8x16_t levels;
    };
    // tables[j][i] are the levels of channel 4·i + j: part i looks up in those of four channels.
    struct Tables {
        int8x16x4_t of_part[parts];
    };
    struct Unit {
        uint8x16_t codes;
    };
    struct FloatTable {
        uint8x16x4_t levels;  // as bytes: 16 floats are the 64 that a lookup takes
    };

    template <class Result, class Body>
    static Result each(Body body) {
        return {{body(0), body(1), body(2), body(3)}};
    }

    static Bytes load(const std::uint8_t* from) {
        return each<Bytes>([&](int i) { return vreinterpretq_s8_u8(vld1q_u8(from + 16 * i)); });
    }
    static void store(std::uint8_t* to, Bytes bytes) {
        for (int i = 0; i < parts; i++)
            vst1q_u8(to + 16 * i, vreinterpretq_u8_s8(bytes.part[i]));
    }
    static Bytes low(Bytes codes) {
        return each<Bytes>([&](int i) { return vandq_s8(codes.part[i], vdupq_n_s8(15)); });
    }
    static Bytes high(Bytes codes) {
        return each<Bytes>([&](int i) {
            return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(codes.part[i]), 4));
        });
    }

    // The low bits of all lanes lie in half as many bytes, and the high bits in a quarter.
    static void three_bits(const std::uint8_t* from, Bytes& low, Bytes& high) {
        const uint8x16_t one = vld1q_u8(from + 32);
        const auto codes = [&](int i, int place, int bit) {
            const uint8x16_t two = vshlq_u8(vld1q_u8(from + 16 * (i % 2)),
                                            vdupq_n_s8(static_cast<std::int8_t>(-place)));
            const uint8x16_t set = vtstq_u8(one, vdupq_n_u8(static_cast<std::uint8_t>(1 << bit)));
            return vreinterpretq_s8_u8(
                vorrq_u8(vandq_u8(two, vdupq_n_u8(3)), vandq_u8(set, vdupq_n_u8(4))));
        };
        low = each<Bytes>([&](int i) { return codes(i, i / 2 * 2, i); });
        high = each<Bytes>([&](int i) { return codes(i, 4 + i / 2 * 2, 4 + i); });
    }

    static Table table(const std::int8_t* levels) { return {vld1q_s8(levels)}; }
    static Tables tables(const std::int8_t* levels) {
        Tables tables;
        for (int i = 0; i < parts; i++)
            for (int j = 0; j < 4; j++)
                tables.of_part[i].val[j] = vld1q_s8(levels + 64 * j + 16 * i);
        return tables;
    }
    static Bytes lookup(Table table, Bytes codes) {
        return each<Bytes>([&](int i) {
            return vqtbl1q_s8(table.levels, vreinterpretq_u8_s8(codes.part[i]));
        });
    }
    static Bytes lookup(const Tables& tables, Bytes codes) {
        const uint8x16_t channel = {0,  0,  0,  0,  16, 16, 16, 16,
                                    32, 32, 32, 32, 48, 48, 48, 48};
        return each<Bytes>([&](int i) {
            const uint8x16_t place = vorrq_u8(vreinterpretq_u8_s8(codes.part[i]), channel);
            return vqtbl4q_s8(tables.of_part[i], place);
        });
    }

    static Sums dot(Sums sums, const Bytes& w, const std::int8_t* x) {
        std::int32_t four;
        std::memcpy(&four, x, 4);
        const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
        return each<Sums>(
            [&](int i) { return Products::dot(sums.part[i], w.part[i], all); });
    }
    static Sums splat(std::int32_t value) {
        return each<Sums>([&](int) { return vdupq_n_s32(value); });
    }
    static Sums add(Sums a, Sums b) {
        return each<Sums>([&](int i) { return vaddq_s32(a.part[i], b.part[i]); });
    }
    static std::int32_t sum_of(Sums sums) {
        return vaddvq_s32(vaddq_s32(vaddq_s32(sums.part[0], sums.part[1]),
                                    vaddq_s32(sums.part[2], sums.part[3])));
    }
    static Floats to_floats(Sums sums) {
        return each<Floats>([&](int i) { return vcvtq_f32_s32(sums.part[i]); });
    }

    static Floats load(const float* from) {
        return each<Floats>([&](int i) { return vld1q_f32(from + 4 * i); });
    }
    static void store(float* to, Floats value) {
        for (int i = 0; i < parts; i++) vst1q_f32(to + 4 * i, value.part[i]);
    }
    static Floats splat(float value) {
        return each<Floats>([&](int) { return vdupq_n_f32(value); });
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        return each<Floats>(
            [&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
    }
    static Floats multiply(Floats a, Floats b) {
        return each<Floats>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
    }
    static Floats divide(Floats a, Floats b) {
        return each<Floats>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
    }
    static float sum_of(Floats value) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(value.part[0], value.part[1]),
                                    vaddq_f32(value.part[2], value.part[3])));
    }
    static Floats larger_magnitude(Floats largest, Floats value) {
        return each<Floats>(
            [&](int i) { return vmaxq_f32(largest.part[i], vabsq_f32(value.part[i])); });
    }
    static float largest_of(Floats value) {
        return vmaxvq_f32(vmaxq_f32(vmaxq_f32(value.part[0], value.part[1]),
                                    vmaxq_f32(value.part[2], value.part[3])));
    }
    static Sums round_to_127(Floats value) {
        return each<Sums>([&](int i) {
            const float32x4_t above = vmaxq_f32(value.part[i], vdupq_n_f32(-127.0f));
            return vcvtnq_s32_f32(vminq_f32(above, vdupq_n_f32(127.0f)));
        });
    }
    static void store_low_bytes(std::int8_t* to, Sums value) {
        const int16x8_t a = vcombine_s16(vmovn_s32(value.part[0]), vmovn_s32(value.part[1]));
        const int16x8_t b = vcombine_s16(vmovn_s32(value.part[2]), vmovn_s32(value.part[3]));
        vst1q_s8(to, vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
    }

    static Unit load_unit(const std::uint8_t* from) { return {vld1q_u8(from)}; }
    static FloatTable float_table(const float* levels) {
        FloatTable table;
        for (int i = 0; i < 4; i++)
            table.levels.val[i] = vreinterpretq_u8_f32(vld1q_f32(levels + 4 * i));
        return table;
    }
    // The bytes of level c are 4·c to 4·c + 3 of the table.
    static Floats lookup(const FloatTable& table, uint8x16_t codes) {
        const uint8x16_t first = vshlq_n_u8(codes, 2);
        const uint8x16_t byte = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        return each<Floats>([&](int i) {
            const auto lane = static_cast<std::uint8_t>(4 * i);
            const uint8x16_t repeat = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
            const uint8x16_t of_lane = vqtbl1q_u8(first, vaddq_u8(repeat, vdupq_n_u8(lane)));
            return vreinterpretq_f32_u8(vqtbl4q_u8(table.levels, vorrq_u8(of_lane, byte)));
        });
    }
    static Floats lookup_low(const FloatTable& table, Unit unit) {
        return lookup(table, vandq_u8(unit.codes, vdupq_n_u8(15)));
    }
    static Floats lookup_high(const FloatTable& table, Unit unit) {
        return lookup(table, vshrq_n_u8(unit.codes, 4));
    }
};

using Neon = NeonOf<ProductsByMull>;

}  // namespace
}  // namespace onnxq
