// 16 lanes in one 512-bit register, and products of bytes by vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnxq {
namespace {

struct Avx512Vnni {
    static constexpr int bias = 128;  // vpdpbusd multiplies unsigned by signed bytes
    static constexpr int integer_rows = 8, float_rows = 4, float_channels = 4;

    using Bytes = __m512i;
    using Floats = __m512;
    using FloatTable = __m512;
    using Unit = __m512i;  // a byte in each lane
    struct Sums {          // a type of its own, so that functions can be told apart
        __m512i value;
    };
    struct Table {
        __m512i levels;
    };
    struct Tables {
        __m512i every_fourth[4];
    };

    static Bytes load(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store(std::uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
    static Bytes low(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
    static Bytes high(Bytes codes) { return low(_mm512_srli_epi16(codes, 4)); }

    // The low bits of all lanes lie in half as many bytes, and the high bits in a quarter.
    static void three_bits(const std::uint8_t* from, Bytes& low, Bytes& high) {
        const __m512i two = _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i one = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32)));
        low = with_high_bits(two, 0, one, 0x01);
        high = with_high_bits(two, 4, one, 0x10);
    }
    static Bytes with_high_bits(__m512i two, int place, __m512i one, int bit) {
        const auto words = [](int first, int second) {
            return _mm512_inserti64x4(_mm512_set1_epi16(static_cast<short>(first)),
                                      _mm256_set1_epi16(static_cast<short>(second)), 1);
        };
        const __m512i bits = _mm512_set_epi64(
            bytes_of(bit << 3), bytes_of(bit << 3), bytes_of(bit << 2), bytes_of(bit << 2),
            bytes_of(bit << 1), bytes_of(bit << 1), bytes_of(bit), bytes_of(bit));
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi16(two, words(place, place + 2)),
                                               _mm512_set1_epi8(3));
        return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(one, bits), codes,
                                    _mm512_set1_epi8(4));
    }
    static long long bytes_of(int byte) {
        return static_cast<long long>(0x0101010101010101ull * static_cast<unsigned>(byte));
    }

    static __m512i unsigned_levels(__m512i levels) {
        return _mm512_xor_si512(levels, _mm512_set1_epi8(-128));
    }
    static Table table(const std::int8_t* levels) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
        return {unsigned_levels(_mm512_broadcast_i32x4(all))};
    }
    static Tables tables(const std::int8_t* levels) {
        Tables tables;
        for (int i = 0; i < 4; i++)
            tables.every_fourth[i] = unsigned_levels(_mm512_loadu_si512(levels + 64 * i));
        return tables;
    }
    static Bytes lookup(Table table, Bytes codes) {
        return _mm512_shuffle_epi8(table.levels, codes);
    }
    static Bytes lookup(const Tables& tables, Bytes codes) {
        Bytes levels = _mm512_shuffle_epi8(tables.every_fourth[0], codes);
        levels = _mm512_mask_shuffle_epi8(levels, 0x00f000f000f000f0, tables.every_fourth[1],
                                          codes);
        levels = _mm512_mask_shuffle_epi8(levels, 0x0f000f000f000f00, tables.every_fourth[2],
                                          codes);
        return _mm512_mask_shuffle_epi8(levels, 0xf000f000f000f000, tables.every_fourth[3], codes);
    }

    static Sums dot(Sums sums, Bytes w, const std::int8_t* x) {
        std::int32_t four;
        std::memcpy(&four, x, 4);
        return {_mm512_dpbusd_epi32(sums.value, w, _mm512_set1_epi32(four))};
    }
    static Sums splat(std::int32_t value) { return {_mm512_set1_epi32(value)}; }
    static Sums add(Sums a, Sums b) { return {_mm512_add_epi32(a.value, b.value)}; }
    static std::int32_t sum_of(Sums sums) { return _mm512_reduce_add_epi32(sums.value); }
    static Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums.value); }

    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
    static Floats splat(float value) { return _mm512_set1_ps(value); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static float sum_of(Floats value) { return _mm512_reduce_add_ps(value); }
    static Floats larger_magnitude(Floats largest, Floats value) {
        return _mm512_max_ps(largest, _mm512_abs_ps(value));
    }
    static float largest_of(Floats value) { return _mm512_reduce_max_ps(value); }
    static Sums round_to_127(Floats value) {
        value = _mm512_max_ps(value, _mm512_set1_ps(-127.0f));
        return {_mm512_cvtps_epi32(_mm512_min_ps(value, _mm512_set1_ps(127.0f)))};
    }
    static void store_low_bytes(std::int8_t* to, Sums value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value.value));
    }

    static Unit load_unit(const std::uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static FloatTable float_table(const float* levels) { return _mm512_loadu_ps(levels); }
    // The permutation looks at the low four bits of each lane alone.
    static Floats lookup_low(FloatTable table, Unit unit) {
        return _mm512_permutexvar_ps(unit, table);
    }
    static Floats lookup_high(FloatTable table, Unit unit) {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(unit, 4), table);
    }
};

}  // namespace
}  // namespace onnxq
