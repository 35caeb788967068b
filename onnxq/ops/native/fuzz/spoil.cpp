// Ways in which a node can be wrong.
#include <algorithm>
#include <limits>
#include <sstream>

#include "cases.h"
#include "random.h"

namespace onnxq::fake {
namespace {

// Any bytes; nothing where that would take too much memory.
Shared anything(Random& random, int type, Shape shape) {
    std::int64_t product = 1;
    for (const std::int64_t size : shape) product *= size;
    return product > 1 << 20 ? nullptr : random.bytes(type, std::move(shape));
}

void spoil_shape(Random& random, Shape& shape) {
    const auto axis = static_cast<std::size_t>(
        random.between(0, std::max<std::int64_t>(0, static_cast<std::int64_t>(shape.size()) - 1)));
    switch (random.between(0, 4)) {
        case 0: shape.insert(shape.begin(), random.between(0, 2)); return;
        case 1: shape.clear(); return;
        case 2: shape.resize(random.chance(50) ? 17 : 3, 1); return;
        case 3:
            if (!shape.empty()) shape[axis] = random.between(0, 70);
            return;
        default:
            if (!shape.empty())
                shape[axis] = std::max<std::int64_t>(0, shape[axis] + random.one_of({-1, 1}));
    }
}

}  // namespace

void spoil(Random& random, Case& c) {
    auto& inputs = c.node.inputs;
    auto& input = inputs[static_cast<std::size_t>(
        random.between(0, static_cast<std::int64_t>(inputs.size()) - 1))];
    switch (random.between(0, 6)) {
        case 0: input.tensor = nullptr; break;
        case 1:
            if (inputs.size() > 1) inputs.pop_back();
            break;
        case 2:
            if (input.tensor)
                input.tensor = anything(random,
                                        random.one_of({float32, uint8, int8, uint16, int32, float16,
                                                       float64}),
                                        input.tensor->shape);
            break;
        case 3:
            if (input.tensor) {
                Shape shape = input.tensor->shape;
                spoil_shape(random, shape);
                input.tensor = anything(random, input.tensor->type, shape);
            }
            break;
        case 4: std::swap(input, inputs[0]); break;
        case 5:
            for (const char* name : {"accuracy_level", "block_size"})
                c.node.attributes[name] =
                    random.one_of<std::int64_t>({-1, 1, 3, 5, 7, 16, 12, 24, 1 << 30,
                                                 std::numeric_limits<std::int64_t>::max(),
                                                 std::numeric_limits<std::int64_t>::min()});
            break;
        default:  // any bits: infinite, undefined and huge numbers
            if (input.tensor) input.tensor = random.bytes(input.tensor->type, input.tensor->shape);
    }
    inputs[0].constant = false;
}

std::string description(const Node& node) {
    std::ostringstream text;
    for (const auto& [name, value] : node.attributes) text << "  " << name << " = " << value << "\n";
    for (const Input& input : node.inputs) {
        text << (input.constant ? "  initializer" : "  input");
        if (input.tensor) {
            text << " of type " << input.tensor->type << " [";
            for (const std::int64_t size : input.tensor->shape) text << " " << size;
            text << " ]";
        } else {
            text << " missing";
        }
        text << "\n";
    }
    return text.str();
}

}  // namespace onnxq::fake
