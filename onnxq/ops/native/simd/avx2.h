// 16 lanes in two 256-bit registers. Products of bytes by vpmaddubsw, or by vpdpbusd of AVX-VNNI.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnxq {
namespace {

// Without VNNI. vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits, and
// saturates: |w| · (x with the sign of w) stays within 2 · 128 · 127, which fits.
struct ProductsByMadd {
    static constexpr int bias = 0;

    static __m256i dot(__m256i sums, __m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

template <class Products>
struct Avx2Of {
    static constexpr int bias = Products::bias;
    static constexpr int integer_rows = 4, float_rows = 2, float_channels = 2;

    struct Bytes {
        __m256i a, b;
    };
    struct Sums {
        __m256i a, b;
    };
    struct Floats {
        __m256 a, b;
    };
    struct Table {
        __m256i levels;
    };
    struct Tables {  // of every fourth channel, for both halves
        __m256i a[4], b[4];
    };
    struct Unit {
        __m256i a, b;
    };
    struct FloatTable {
        __m256 first, second;  // levels of codes 0 to 7 and 8 to 15
    };

    static __m256i load_bytes(const void* from) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(from));
    }
    static Bytes load(const std::uint8_t* from) { return {load_bytes(from), load_bytes(from + 32)}; }
    static void store(std::uint8_t* to, Bytes bytes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), bytes.b);
    }
    static Bytes low(Bytes codes) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(codes.a, mask), _mm256_and_si256(codes.b, mask)};
    }
    static Bytes high(Bytes codes) {
        return low({_mm256_srli_epi16(codes.a, 4), _mm256_srli_epi16(codes.b, 4)});
    }

    // The low bits of all lanes lie in half as many bytes, and the high bits in a quarter.
    static void three_bits(const std::uint8_t* from, Bytes& low, Bytes& high) {
        const __m256i two = load_bytes(from);
        const __m256i one = _mm256_srlv_epi64(
            _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32))),
            _mm256_set_epi64x(1, 1, 0, 0));
        low = {joined(two, _mm256_slli_epi16(one, 2)), joined(_mm256_srli_epi16(two, 2), one)};
        high = {joined(_mm256_srli_epi16(two, 4), _mm256_srli_epi16(one, 2)),
                joined(_mm256_srli_epi16(two, 6), _mm256_srli_epi16(one, 4))};
    }
    static __m256i joined(__m256i two, __m256i one) {
        return _mm256_or_si256(_mm256_and_si256(two, _mm256_set1_epi8(3)),
                               _mm256_and_si256(one, _mm256_set1_epi8(4)));
    }

    static __m256i biased(__m256i levels) {
        return _mm256_xor_si256(levels, _mm256_set1_epi8(static_cast<char>(bias)));
    }
    static Table table(const std::int8_t* levels) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
        return {biased(_mm256_broadcastsi128_si256(all))};
    }
    static Tables tables(const std::int8_t* levels) {
        Tables tables;
        for (int i = 0; i < 4; i++) {
            tables.a[i] = biased(load_bytes(levels + 64 * i));
            tables.b[i] = biased(load_bytes(levels + 64 * i + 32));
        }
        return tables;
    }
    static Bytes lookup(Table table, Bytes codes) {
        return {_mm256_shuffle_epi8(table.levels, codes.a),
                _mm256_shuffle_epi8(table.levels, codes.b)};
    }
    static __m256i lookup(const __m256i (&tables)[4], __m256i codes) {
        const __m256i even = _mm256_blend_epi32(_mm256_shuffle_epi8(tables[0], codes),
                                                _mm256_shuffle_epi8(tables[2], codes), 0x44);
        const __m256i odd = _mm256_blend_epi32(_mm256_shuffle_epi8(tables[1], codes),
                                               _mm256_shuffle_epi8(tables[3], codes), 0x88);
        return _mm256_blend_epi32(even, odd, 0xaa);
    }
    static Bytes lookup(const Tables& tables, Bytes codes) {
        return {lookup(tables.a, codes.a), lookup(tables.b, codes.b)};
    }

    static Sums dot(Sums sums, Bytes w, const std::int8_t* x) {
        std::int32_t four;
        std::memcpy(&four, x, 4);
        const __m256i all = _mm256_set1_epi32(four);
        return {Products::dot(sums.a, w.a, all), Products::dot(sums.b, w.b, all)};
    }
    static Sums splat(std::int32_t value) {
        return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
    }
    static Sums add(Sums x, Sums y) {
        return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
    }
    static std::int32_t sum_of(Sums sums) {
        const __m256i both = _mm256_add_epi32(sums.a, sums.b);
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both),
                                     _mm256_extracti128_si256(both, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
    static Floats to_floats(Sums sums) {
        return {_mm256_cvtepi32_ps(sums.a), _mm256_cvtepi32_ps(sums.b)};
    }

    static Floats load(const float* from) {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    static void store(float* to, Floats value) {
        _mm256_storeu_ps(to, value.a);
        _mm256_storeu_ps(to + 8, value.b);
    }
    static Floats splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats fma(Floats x, Floats y, Floats z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static Floats multiply(Floats x, Floats y) {
        return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
    }
    static Floats divide(Floats x, Floats y) {
        return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
    }
    static float sum_of(Floats value) {
        const __m256 both = _mm256_add_ps(value.a, value.b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    static Floats larger_magnitude(Floats largest, Floats value) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_max_ps(largest.a, _mm256_andnot_ps(sign, value.a)),
                _mm256_max_ps(largest.b, _mm256_andnot_ps(sign, value.b))};
    }
    static float largest_of(Floats value) {
        const __m256 both = _mm256_max_ps(value.a, value.b);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    }
    static __m256i round_to_127(__m256 value) {
        value = _mm256_max_ps(value, _mm256_set1_ps(-127.0f));
        return _mm256_cvtps_epi32(_mm256_min_ps(value, _mm256_set1_ps(127.0f)));
    }
    static Sums round_to_127(Floats value) {
        return {round_to_127(value.a), round_to_127(value.b)};
    }
    static void store_low_bytes(std::int8_t* to, Sums value) {
        // Packing works within each half of 128 bits: the middle quarters change places.
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(value.a, value.b), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words),
                                              _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    }

    static Unit load_unit(const std::uint8_t* from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    }
    static FloatTable float_table(const float* levels) {
        return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
    }
    // The permutation looks at the low three bits of each lane; the fourth, moved to where a blend
    // sees it, says in which table.
    static __m256 lookup(FloatTable table, __m256i codes) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.first, codes),
                                _mm256_permutevar8x32_ps(table.second, codes),
                                _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    static Floats lookup_low(FloatTable table, Unit unit) {
        return {lookup(table, unit.a), lookup(table, unit.b)};
    }
    static Floats lookup_high(FloatTable table, Unit unit) {
        return {lookup(table, _mm256_srli_epi32(unit.a, 4)),
                lookup(table, _mm256_srli_epi32(unit.b, 4))};
    }
};

using Avx2 = Avx2Of<ProductsByMadd>;

}  // namespace
}  // namespace onnxq
