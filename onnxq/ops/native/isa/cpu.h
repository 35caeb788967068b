// What instructions this CPU has and its system lets programs use.
#pragma once

namespace onnxq {

struct Cpu {
    bool avx2 = false;        // AVX2 and FMA
    bool avxvnni = false;     // those and AVX-VNNI
    bool avx512vnni = false;  // AVX-512 F, BW, VL, DQ and VNNI
    bool neon = false;
    bool neondot = false;     // NEON with sdot

    static Cpu here();
};

}  // namespace onnxq
