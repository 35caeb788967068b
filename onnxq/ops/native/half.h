// float16 as its bits: IEEE 754 binary16, rounded half to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace onnxq {

struct Half {
    std::uint16_t bits;
};
static_assert(sizeof(Half) == 2);

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(Half half) {
    const std::uint32_t sign = (half.bits & 0x8000u) << 16;
    const std::uint32_t rest = (half.bits & 0x7fffu) << 13;  // exponent and fraction in place
    const std::uint32_t infinity_or_nan = (half.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    // 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
    const float value = from_bits(rest) * from_bits(0x77800000u);
    return from_bits(sign | to_bits(value) | infinity_or_nan);
}

inline Half to_half(float value) {
    const std::uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const auto with_sign = [sign](std::uint32_t rest) {
        return Half{static_cast<std::uint16_t>(sign | rest)};
    };
    if (magnitude > 0x7f800000u) return with_sign(0x7e00u);    // not a number
    if (magnitude >= 0x477ff000u) return with_sign(0x7c00u);   // rounds past 65504
    if (magnitude < 0x38800000u) {                             // subnormal: unit 2^-24
        // The sum's unit is 2^-24, so the addition rounds to it.
        const float rounded = from_bits(magnitude) + 0.5f;
        return with_sign(to_bits(rounded) - to_bits(0.5f));
    }
    const std::uint32_t odd = magnitude >> 13 & 1;
    return with_sign((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
    return value;
}
template <>
inline Half from_float<Half>(float value) {
    return to_half(value);
}

}  // namespace onnxq
