// Random tensors, the same for the same seed.
#pragma once

#include <initializer_list>
#include <random>

#include "../half.h"
#include "fake_runtime.h"

namespace onnxq::fake {

enum Type { float32 = 1, uint8 = 2, int8 = 3, uint16 = 4, int32 = 6, float16 = 10, float64 = 11 };

using Shape = std::vector<std::int64_t>;
using Shared = std::shared_ptr<Tensor>;

class Random {
  public:
    explicit Random(std::uint32_t seed) : engine_(seed) {}

    std::int64_t between(std::int64_t least, std::int64_t most) {
        return std::uniform_int_distribution<std::int64_t>(least, most)(engine_);
    }
    bool chance(int percent) { return between(0, 99) < percent; }
    template <class T>
    T one_of(std::initializer_list<T> choices) {
        return choices.begin()[between(0, static_cast<std::int64_t>(choices.size()) - 1)];
    }
    float real(float least, float most) {
        return std::uniform_real_distribution<float>(least, most)(engine_);
    }
    Shared bytes(int type, Shape shape) {
        auto tensor = std::make_shared<Tensor>(type, std::move(shape));
        for (std::size_t i = 0; i < tensor->bytes; i++)
            tensor->memory[i] = static_cast<std::byte>(between(0, 255));
        return tensor;
    }
    Shared reals(int type, Shape shape, float least, float most) {
        auto tensor = std::make_shared<Tensor>(type, std::move(shape));
        for (std::int64_t i = 0; i < tensor->elements(); i++) {
            if (type == float16)
                tensor->as<Half>()[i] = to_half(real(least, most));
            else
                tensor->as<float>()[i] = real(least, most);
        }
        return tensor;
    }

  private:
    std::mt19937 engine_;
};

}  // namespace onnxq::fake
