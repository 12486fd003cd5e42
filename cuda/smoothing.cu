// Sums over rows, products with a vector and outer products of whole matrices: the uniform part of label smoothing. Each
// reads a matrix once.
#include "common.cuh"

struct SumRowsParams {
  const void *matrix;      // (rows, columns)
  const float *weights;    // (rows)
  const uint32_t *counts;  // (rows): rows where it is 0 are left out; or null
  float *partials;         // out: (blocks in y, columns)
  int64_t rows, columns;
};

constexpr int COLUMNS = 256;  // threads, and columns of a block

// A block has every gridDim.y-th row of some columns.
template <typename T> __device__ void weighted_sum(const SumRowsParams &p) {
  const int64_t column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
  if (column >= p.columns) return;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y)
    if (!p.counts || p.counts[row]) sum += p.weights[row] * to_float(((const T *)p.matrix)[row * p.columns + column]);
  p.partials[blockIdx.y * p.columns + column] = sum;
}

struct SumPartialsParams {
  const float *partials;  // (parts, columns)
  float *sum;             // out: (columns)
  int64_t columns;
  uint32_t parts;
};

extern "C" __global__ void sum_partials(const SumPartialsParams p) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= p.columns) return;
  float sum = 0.f;
#pragma unroll 8
  for (uint32_t part = 0; part < p.parts; part++) sum += p.partials[part * p.columns + column];
  p.sum[column] = sum;
}

struct DotsParams {
  const void *matrix;   // (rows, columns)
  const float *vector;  // (columns)
  float *dots;          // out: (rows)
  int64_t rows, columns;
};

// One warp a row.
template <typename T> __device__ void dots(const DotsParams &p) {
  const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (row >= p.rows) return;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < p.columns; i += 32) sum += to_float(((const T *)p.matrix)[row * p.columns + i]) * p.vector[i];
  for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
  if (threadIdx.x % 32 == 0) p.dots[row] = sum;
}

struct OuterParams {
  void *matrix;            // (rows, columns), in and out
  const float *left;       // (rows)
  const float *right;      // (columns)
  const uint32_t *counts;  // (rows): rows where it is 0 stay as they are; or null
  int64_t rows, columns;
};

// matrix += left right^T. A block has every gridDim.y-th row of some columns.
template <typename T> __device__ void add_outer(const OuterParams &p) {
  const int64_t column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
  if (column >= p.columns) return;
  const float right = p.right[column];
#pragma unroll 8
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    if (p.counts && !p.counts[row]) continue;
    T &x = ((T *)p.matrix)[row * p.columns + column];
    x = from_float<T>(to_float(x) + p.left[row] * right);
  }
}

#define PER_DTYPE(SUFFIX, T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(COLUMNS) weighted_sum_##SUFFIX(const SumRowsParams p) { weighted_sum<T>(p); } \
  extern "C" __global__ void dots_##SUFFIX(const DotsParams p) { dots<T>(p); }                                    \
  extern "C" __global__ void __launch_bounds__(COLUMNS) add_outer_##SUFFIX(const OuterParams p) { add_outer<T>(p); }
PER_DTYPE(bf16, __nv_bfloat16)
PER_DTYPE(f16, __half)
PER_DTYPE(f32, float)
