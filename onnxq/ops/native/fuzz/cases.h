// Random nodes, what y they must give, and ways to spoil them.
#pragma once

#include <functional>

#include "fake_runtime.h"

namespace onnxq::fake {

struct Case {
    Node node;
    std::string isa;  // ONNXQ_OPS_ISA
    bool is_right = true;
    std::function<std::string(Tensor& y)> compare;  // what is wrong with y; nothing if all is well
};

class Random;

Case random_case(std::uint32_t seed);
void spoil(Random&, Case&);
std::string description(const Node&);

}  // namespace onnxq::fake
