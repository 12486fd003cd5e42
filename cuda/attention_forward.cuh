// The forward of attention: out = softmax(mask(cap(scale q k^T))) v, and the log-sum-exp of each row.
//
// A block has a tile of queries of one head and goes through the keys that they see, with a running maximum and sum: as
// in Dao, FlashAttention-2, arXiv 2307.08691.
#pragma once
#include "attention.cuh"

// Sizes for numbers T and heads of at most SIZE dimensions: within 99 KB of shared memory and 255 registers.
template <typename T, int SIZE> struct ForwardSizes {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int M = HALF && SIZE <= 128 ? 2 : 1;
  static constexpr int WARPS = 4;
  static constexpr int ROWS = WARPS * M * 16;
  static constexpr int N = HALF ? (SIZE <= 128 ? 64 : 32) : (SIZE <= 128 ? 32 : 16);
  static constexpr int STAGES_ = !HALF && SIZE > 128 ? 1 : 2;
  static constexpr int ROW_BYTES = Tile<T, SIZE>::ROW_BYTES;
  static constexpr int BYTES = (ROWS + STAGES_ * 2 * N) * ROW_BYTES;
};
static_assert(bytes_are<ForwardSizes, __half>(49152, 98304, 98304, 98304) &&
                  bytes_are<ForwardSizes, float>(49152, 73728, 98304, 98304),
              "the host asks for as much shared memory");

template <typename T, int SIZE> __device__ void attention_forward(const AttentionParams &p, uint8_t *memory) {
  using Sizes = ForwardSizes<T, SIZE>;
  using Rows = Tile<T, SIZE>;
  constexpr int M = Sizes::M, N = Sizes::N, BLOCKS = N / 8, WIDE = SIZE / 8, COPIERS = Sizes::WARPS * 32;
  const uint32_t q_tile = shared_address(memory), stages = q_tile + Sizes::ROWS * Rows::ROW_BYTES;
  const auto k_tile = [&](int tile) { return stages + tile % Sizes::STAGES_ * 2 * N * Rows::ROW_BYTES; };
  const auto v_tile = [&](int tile) { return k_tile(tile) + N * Rows::ROW_BYTES; };

  // The last queries see the most keys: they come first.
  const uint32_t heads = p.batch * p.heads, tiles = gridDim.x / heads;
  const uint32_t index = blockIdx.x % heads;
  const Head head = {index / p.heads, index % p.heads};
  const int query0 = (tiles - 1 - blockIdx.x / heads) * Sizes::ROWS, queries = min(Sizes::ROWS, (int)p.queries - query0);
  const T *q = (const T *)p.q + offset(p.q_strides, head.batch, head.head) + query0 * p.q_strides.time;
  const T *k = (const T *)p.k + offset(p.k_strides, head.batch, head.head / p.group);
  const T *v = (const T *)p.v + offset(p.v_strides, head.batch, head.head / p.group);
  const Sight sight(p);
  const int2 range = sight.tiles_of_keys<N>(query0, queries);

  const auto load = [&](int tile) {
    const int key = tile * N;
    Rows::template load<N, COPIERS>(k_tile(tile), k + key * p.k_strides.time, p.k_strides.time, (int)p.keys - key, p.head_dim);
    Rows::template load<N, COPIERS>(v_tile(tile), v + key * p.v_strides.time, p.v_strides.time, (int)p.keys - key, p.head_dim);
    cp_async_commit();
  };
  Rows::template load<Sizes::ROWS, COPIERS>(q_tile, q, p.q_strides.time, queries, p.head_dim);
  if (range.x < range.y) load(range.x);

  const int warp_row = threadIdx.x / 32 * M * 16;
  float out[M][WIDE][4], max[M][2], sum[M][2];
  clear(out);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) max[m][half] = MASKED, sum[m][half] = 0.f;
  // From a product, or what the softcap's tanh makes of it, to a logit in units of ln 2.
  const float to_log2 = (p.softcap > 0.f ? p.softcap : p.scale) * LOG2E;

  for (int tile = range.x; tile < range.y; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (Sizes::STAGES_ == 2 && tile + 1 < range.y) load(tile + 1);
    float scores[M][BLOCKS][4];
    multiply_rows<T, SIZE>(scores, q_tile, warp_row, k_tile(tile));
    if (p.softcap > 0.f) soften(scores, p.scale / p.softcap);
    if (!sight.all(query0, queries, tile * N, N))
      mask(scores, [&](int m, int n, int i) {
        return sight.sees(query0 + warp_row + m * 16 + row_of(i), tile * N + n * 8 + column_of(i));
      });
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float larger = max[m][half];
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) larger = fmaxf(larger, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 1));
        larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 2));
        // Until a key is seen nothing is subtracted: MASKED less its rounded product would be far from 0, not 0.
        const float rescale = fast_exp2((max[m][half] - larger) * to_log2);
        const float subtracted = larger == MASKED ? 0.f : larger * to_log2;
        max[m][half] = larger;
        sum[m][half] *= rescale;
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float &z = scores[m][n][2 * half + j];
            z = fast_exp2(z * to_log2 - subtracted);
            sum[m][half] += z;
          }
#pragma unroll
        for (int n = 0; n < WIDE; n++) out[m][n][2 * half] *= rescale, out[m][n][2 * half + 1] *= rescale;
      }
    multiply_columns<T, SIZE>(out, scores, v_tile(tile), 0);
    if (Sizes::STAGES_ == 1 && tile + 1 < range.y) {
      __syncthreads();
      load(tile + 1);
    }
  }
  cp_async_wait<0>();

  float *lse = p.lse + head.rows(p) + query0;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float &total = sum[m][half];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      const int row = warp_row + m * 16 + row_of(2 * half);
      if ((threadIdx.x & 3) == 0 && row < queries) lse[row] = max[m][half] * to_log2 * LN2 + logf(total);
      const float inverse = 1.f / total;
#pragma unroll
      for (int n = 0; n < WIDE; n++) out[m][n][2 * half] *= inverse, out[m][n][2 * half + 1] *= inverse;
    }
  const int64_t stride = (int64_t)p.heads * p.head_dim;
  T *to = (T *)p.out + head.contiguous(p, p.queries, p.heads) + (query0 + warp_row) * stride;
  store(out, 1.f, to, stride, queries - warp_row, 0, p.head_dim);
}

#define FORWARD(SUFFIX, T, SIZE)                                                                              \
  extern "C" __global__ void __launch_bounds__(ForwardSizes<T, SIZE>::WARPS * 32)                            \
      attention_forward_##SIZE##_##SUFFIX(const AttentionParams p) {                                         \
    extern __shared__ __align__(128) uint8_t memory[];                                                       \
    attention_forward<T, SIZE>(p, memory);                                                                   \
  }
