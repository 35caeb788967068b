// Two kernels: few rows are bound by the reading of codes, a warp for each output channel; many by
// arithmetic, in tiles of which the weights are looked up once for 64 rows.
#include <cuda_fp16.h>

#include "codebook.h"

namespace onnxq::cuda {
namespace {

constexpr int warp = 32;
constexpr int warps = 4;        // of a thread block that decodes
constexpr int decoded_rows = 4;  // of x at a time; with more, tiles are faster
constexpr int tile = 64;        // rows and channels of a tile of y
constexpr int depth = 16;       // inputs of a tile; divides every block
constexpr int side = 16;        // threads along either side of a tile
constexpr int each = tile / side;

__device__ float number(const Numbers& n, std::int64_t channel, std::int64_t block, int index = 0) {
    if (!n.data) return 0.0f;
    const std::int64_t place = channel * n.per_channel + block * n.per_block + index;
    switch (n.type) {
        case Number::float32: return static_cast<const float*>(n.data)[place];
        case Number::float16: return __half2float(static_cast<const __half*>(n.data)[place]);
        default: return static_cast<const std::int8_t*>(n.data)[place];
    }
}

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ void put(float& to, float value) { to = value; }
__device__ void put(__half& to, float value) { to = __float2half_rn(value); }

__device__ std::int64_t blocks_of(const Product& p) { return (p.inputs + p.block - 1) / p.block; }

// A lane takes 16 codes at a time, which lie within one block: a scale for 16 products.
template <class T>
__global__ void decode(Product p) {
    const std::int64_t channel = std::int64_t{blockIdx.x} * warps + threadIdx.y;
    const std::int64_t first = std::int64_t{blockIdx.y} * decoded_rows;
    if (channel >= p.channels) return;
    const auto* x = static_cast<const T*>(p.x) + first * p.inputs;
    const std::int64_t bytes = blocks_of(p) * p.block / 2;
    const int rows = static_cast<int>(min(std::int64_t{decoded_rows}, p.rows - first));

    float sums[decoded_rows] = {};
    for (std::int64_t k = threadIdx.x * 16; k < p.inputs; k += warp * 16) {
        const std::int64_t block = k / p.block;
        const float scale = number(p.scales, channel, block);
        const float zero = number(p.zero_points, channel, block);
        const auto eight = *reinterpret_cast<const uint2*>(p.codes + channel * bytes + k / 2);
        const int count = static_cast<int>(min(std::int64_t{16}, p.inputs - k));
        float products[decoded_rows] = {};
        for (int i = 0; i < count; i++) {
            const unsigned code = (i < 8 ? eight.x : eight.y) >> (i % 8 * 4) & 15;
            const float level = number(p.codebook, channel, block, code) - zero;
#pragma unroll
            for (int m = 0; m < decoded_rows; m++)
                if (m < rows) products[m] += level * to_float(x[m * p.inputs + k + i]);
        }
#pragma unroll
        for (int m = 0; m < decoded_rows; m++) sums[m] += scale * products[m];
    }
#pragma unroll
    for (int m = 0; m < decoded_rows; m++) {
        for (int step = warp / 2; step; step /= 2)
            sums[m] += __shfl_down_sync(0xffffffffu, sums[m], step);
        if (threadIdx.x == 0 && m < rows)
            put(static_cast<T*>(p.y)[(first + m) * p.channels + channel],
                sums[m] + number(p.bias, channel, 0));
    }
}

// A thread block makes 64 × 64 of y, a thread 4 × 4 of them.
template <class T>
__global__ void prefill(Product p) {
    // One more column than the depth: the threads of a warp then read different banks.
    __shared__ float x_tile[tile][depth + 1], w_tile[tile][depth + 1];
    const std::int64_t row = std::int64_t{blockIdx.y} * tile;
    const std::int64_t channel = std::int64_t{blockIdx.x} * tile;
    const std::int64_t bytes = blocks_of(p) * p.block / 2;
    const auto* x = static_cast<const T*>(p.x);

    float sums[each][each] = {};
    for (std::int64_t k0 = 0; k0 < p.inputs; k0 += depth) {
        const std::int64_t k = k0 + threadIdx.x, block = k0 / p.block;
        for (int i = threadIdx.y; i < tile; i += side) {
            const std::int64_t m = row + i, n = channel + i;
            const bool inside = k < p.inputs;
            x_tile[i][threadIdx.x] =
                inside && m < p.rows ? to_float(x[m * p.inputs + k]) : 0.0f;
            float w = 0.0f;
            if (inside && n < p.channels) {
                const int code = p.codes[n * bytes + k / 2] >> (k % 2 * 4) & 15;
                w = number(p.scales, n, block) *
                    (number(p.codebook, n, block, code) - number(p.zero_points, n, block));
            }
            w_tile[i][threadIdx.x] = w;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < depth; i++)
            for (int m = 0; m < each; m++)
                for (int n = 0; n < each; n++)
                    sums[m][n] +=
                        x_tile[threadIdx.y + side * m][i] * w_tile[threadIdx.x + side * n][i];
        __syncthreads();
    }
    for (int i = 0; i < each; i++)
        for (int j = 0; j < each; j++) {
            const std::int64_t m = row + threadIdx.y + side * i;
            const std::int64_t n = channel + threadIdx.x + side * j;
            if (m < p.rows && n < p.channels)
                put(static_cast<T*>(p.y)[m * p.channels + n], sums[i][j] + number(p.bias, n, 0));
        }
}

unsigned parts(std::int64_t whole, std::int64_t part) {
    return static_cast<unsigned>((whole + part - 1) / part);
}

template <class T>
void launch(const Product& p, cudaStream_t stream) {
    if (p.rows <= 4 * decoded_rows) {
        const dim3 grid(parts(p.channels, warps), parts(p.rows, decoded_rows));
        decode<T><<<grid, dim3(warp, warps), 0, stream>>>(p);
    } else {
        const dim3 grid(parts(p.channels, tile), parts(p.rows, tile));
        prefill<T><<<grid, dim3(side, side), 0, stream>>>(p);
    }
}

}  // namespace

cudaError_t multiply(const Product& p, cudaStream_t stream) {
    if (p.rows == 0 || p.channels == 0) return cudaSuccess;
    if (p.type == Number::float16)
        launch<__half>(p, stream);
    else
        launch<float>(p, stream);
    return cudaGetLastError();
}

}  // namespace onnxq::cuda
