// Root-mean-square norm of rows, with the residual added on the way, and its gradients.
//
//   y = x / sqrt(mean(x^2) + eps) * (offset + weight)
//
// A warp has a row. The gradient of the weight is a sum over all rows: chunks of them first, then the chunks, each in
// a fixed order.
#include "vectors.cuh"

constexpr int ROW_THREADS = 256;     // a warp a row
constexpr int COLUMN_THREADS = 128;  // a thread a column
constexpr int SUM_COLUMNS = 32, SUM_PARTS = 32;

struct RmsNormParams {
  const void *x, *residual, *weight;  // (rows, size), the same or null, (size)
  void *sum, *normed;                 // out: x + residual where there is one, y
  const void *upstream;               // (rows, size)
  void *x_grad;                       // out
  float *inverse_rms;                 // (rows), null where the weight's gradient is not wanted
  float *partials;                    // (chunks, size)
  void *weight_grad;                  // (size)
  uint64_t rows;
  uint32_t size, chunk_rows, chunks, aligned;
  float eps, offset;
};

__device__ __forceinline__ int64_t row_of_warp() {
  return (int64_t)blockIdx.x * (ROW_THREADS / 32) + threadIdx.x / 32;
}

template <typename T, int N> __device__ void forward(const RmsNormParams &p) {
  const int64_t row = row_of_warp();
  if (row >= (int64_t)p.rows) return;
  const uint32_t first = (threadIdx.x & 31) * N;
  const T *x = (const T *)p.x + row * p.size;
  float squares = 0.f;
  for (uint32_t i = first; i < p.size; i += 32 * N) {
    auto numbers = Numbers<T, N>::load(x + i);
    if (p.residual) {
      const auto more = Numbers<T, N>::load((const T *)p.residual + row * p.size + i);
#pragma unroll
      for (int j = 0; j < N; j++) numbers.set(j, numbers.get(j) + more.get(j));
      numbers.store((T *)p.sum + row * p.size + i);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares += numbers.get(j) * numbers.get(j);
  }
  const float inverse_rms = rsqrtf(warp_sum(squares) / p.size + p.eps);
  // A lane reads what it has written itself.
  const T *source = p.residual ? (const T *)p.sum + row * p.size : x;
  for (uint32_t i = first; i < p.size; i += 32 * N) {
    auto numbers = Numbers<T, N>::load(source + i);
    const auto weight = Numbers<T, N>::load((const T *)p.weight + i);
#pragma unroll
    for (int j = 0; j < N; j++) numbers.set(j, numbers.get(j) * inverse_rms * (p.offset + weight.get(j)));
    numbers.store((T *)p.normed + row * p.size + i);
  }
}

// With r = 1 / rms and g = upstream * (offset + weight): dx = r (g - x r^2 mean(g x)).
template <typename T, int N> __device__ void x_gradient(const RmsNormParams &p) {
  const int64_t row = row_of_warp();
  if (row >= (int64_t)p.rows) return;
  const uint32_t first = (threadIdx.x & 31) * N;
  const T *x = (const T *)p.x + row * p.size, *upstream = (const T *)p.upstream + row * p.size;
  float squares = 0.f, products = 0.f;
  for (uint32_t i = first; i < p.size; i += 32 * N) {
    const auto numbers = Numbers<T, N>::load(x + i), above = Numbers<T, N>::load(upstream + i);
    const auto weight = Numbers<T, N>::load((const T *)p.weight + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      squares += numbers.get(j) * numbers.get(j);
      products += above.get(j) * (p.offset + weight.get(j)) * numbers.get(j);
    }
  }
  const float inverse_rms = rsqrtf(warp_sum(squares) / p.size + p.eps);
  const float along = inverse_rms * inverse_rms * warp_sum(products) / p.size;
  if (p.inverse_rms && first == 0) p.inverse_rms[row] = inverse_rms;
  for (uint32_t i = first; i < p.size; i += 32 * N) {
    const auto numbers = Numbers<T, N>::load(x + i), above = Numbers<T, N>::load(upstream + i);
    const auto weight = Numbers<T, N>::load((const T *)p.weight + i);
    Numbers<T, N> gradient;
#pragma unroll
    for (int j = 0; j < N; j++)
      gradient.set(j, inverse_rms * (above.get(j) * (p.offset + weight.get(j)) - numbers.get(j) * along));
    gradient.store((T *)p.x_grad + row * p.size + i);
  }
}

template <typename T> __device__ void weight_partials(const RmsNormParams &p) {
  const uint32_t column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (column >= p.size) return;
  const uint64_t first = (uint64_t)blockIdx.y * p.chunk_rows, end = min(first + p.chunk_rows, p.rows);
  float sum = 0.f;
#pragma unroll 4
  for (uint64_t row = first; row < end; row++) {
    const uint64_t at = row * p.size + column;
    sum += to_float(((const T *)p.upstream)[at]) * to_float(((const T *)p.x)[at]) * p.inverse_rms[row];
  }
  p.partials[(uint64_t)blockIdx.y * p.size + column] = sum;
}

template <typename T> __device__ void weight_gradient(const RmsNormParams &p) {
  __shared__ float parts[SUM_PARTS][SUM_COLUMNS];
  const uint32_t lane = threadIdx.x % SUM_COLUMNS, part = threadIdx.x / SUM_COLUMNS;
  const uint32_t column = blockIdx.x * SUM_COLUMNS + lane;
  float sum = 0.f;
  if (column < p.size)
    for (uint32_t chunk = part; chunk < p.chunks; chunk += SUM_PARTS) sum += p.partials[(uint64_t)chunk * p.size + column];
  parts[part][lane] = sum;
  __syncthreads();
  if (part == 0 && column < p.size) {
    for (int i = 1; i < SUM_PARTS; i++) sum += parts[i][lane];
    ((T *)p.weight_grad)[column] = from_float<T>(sum);
  }
}

FOR_DTYPES(rms_norm_forward, forward, RmsNormParams, ROW_THREADS)
FOR_DTYPES(rms_norm_x_gradient, x_gradient, RmsNormParams, ROW_THREADS)

#define OF_WEIGHT(SUFFIX, T)                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) rms_norm_weight_partials_##SUFFIX(const RmsNormParams p) { weight_partials<T>(p); } \
  extern "C" __global__ void __launch_bounds__(SUM_COLUMNS *SUM_PARTS) rms_norm_weight_gradient_##SUFFIX(const RmsNormParams p) { weight_gradient<T>(p); }
OF_WEIGHT(bf16, __nv_bfloat16)
OF_WEIGHT(f16, __half)
OF_WEIGHT(f32, float)
