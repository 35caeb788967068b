// As much of ONNX Runtime as the operators call, for a program that is nothing but them: every
// tensor has memory of its own size, so that a sanitizer sees one byte too many.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../ort.h"

namespace onnxq::fake {

struct Tensor {
    int type = 0;  // ONNXTensorElementDataType
    std::vector<std::int64_t> shape;
    std::unique_ptr<std::byte[]> memory;
    std::size_t bytes = 0;

    Tensor(int element_type, std::vector<std::int64_t> of_shape);
    std::int64_t elements() const;
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(memory.get());
    }
};

// An input; none at all where `tensor` is empty, which a node writes as "".
struct Input {
    std::shared_ptr<Tensor> tensor;
    bool constant = false;  // an initializer, known when the kernel is made
};

struct Node {
    std::string op;
    std::map<std::string, std::int64_t> attributes;
    std::vector<Input> inputs;
};

// What a session would get: an error's text, or y.
struct Outcome {
    std::string error;
    std::shared_ptr<Tensor> y;
};

// Infers the shape of y, makes the kernel, and calls it twice.
Outcome run(const Node&);

}  // namespace onnxq::fake
