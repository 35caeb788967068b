// What instructions this CPU has and its system lets programs use.
#pragma once

namespace onnxq {

struct Cpu {
    bool avx2 = false;        // AVX2 and FMA
    bool avxvnni = false;     // those and AVX-VNNI
    bool avx512vnni = false;  // AVX-512 F, BW, VL, DQ and VNNI
    bool avx512vbmi = false;  // those, AVX-512 VBMI and GFNI
    bool neon = false;
    bool neondot = false;     // NEON with sdot

    static Cpu here();
};

}  // namespace onnxq
