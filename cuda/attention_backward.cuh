// The gradients of attention, from its inputs, its result and the log-sum-exp of each row.
//
//   P = exp(z - lse),  dP = dO V^T,  dZ = P (dP - delta),  delta = rowsum(dO O)
//   dV = P^T dO,  dK = scale dZ^T Q,  dQ = scale dZ K,  with the softcap's slope in dZ
//
// One kernel has tiles of keys and goes through the queries that see them, of all heads that share the keys; one has
// tiles of queries and goes through the keys. Both compute P again: no sums in memory that several blocks add to, so
// that a run repeats bit by bit.
#pragma once
#include "attention.cuh"

// ---------------------------------------------------------------- delta

constexpr int DELTA_THREADS = 256;

// A warp has a row of `out`.
template <typename T> __device__ void attention_delta(const AttentionParams &p) {
  const int64_t row = (int64_t)blockIdx.x * (DELTA_THREADS / 32) + threadIdx.x / 32;
  if (row >= (int64_t)p.batch * p.queries * p.heads) return;
  const int64_t from = row * p.head_dim;
  float sum = 0.f;
  for (uint32_t i = threadIdx.x & 31; i < p.head_dim; i += 32)
    sum += to_float(((const T *)p.out)[from + i]) * to_float(((const T *)p.out_grad)[from + i]);
#pragma unroll
  for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
  const int64_t head = row % p.heads, position = row / p.heads;
  const int64_t batch = position / p.queries, query = position % p.queries;
  if ((threadIdx.x & 31) == 0) p.delta[(batch * p.heads + head) * p.queries + query] = sum;
}

// ---------------------------------------------------------------- what both kernels do to scores

// Products of queries and keys become probabilities, and the gradients of those the gradients of scale * products.
// `statistics(m, n, i)` is the row's log-sum-exp in units of ln 2, inf for a query that does not exist, and its delta.
template <int M, int BLOCKS, class Statistics, class Seen>
__device__ __forceinline__ void softmax_gradient(const AttentionParams &p, float (&scores)[M][BLOCKS][4],
                                                 float (&gradients)[M][BLOCKS][4], Statistics statistics, bool all_seen, Seen seen) {
  const float to_log2 = (p.softcap > 0.f ? p.softcap : p.scale) * LOG2E;
  const bool capped = p.softcap > 0.f;
  if (capped) soften(scores, p.scale / p.softcap);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) gradients[m][n][i] -= statistics(m, n, i).y;
  if (capped)
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) gradients[m][n][i] *= 1.f - scores[m][n][i] * scores[m][n][i];
  if (!all_seen) mask(scores, seen);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[m][n][i] = fast_exp2(scores[m][n][i] * to_log2 - statistics(m, n, i).x);
        gradients[m][n][i] *= scores[m][n][i];
      }
}

// ---------------------------------------------------------------- keys and values

template <typename T, int SIZE> struct KeySizes {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int ROW_WARPS = HALF || SIZE <= 128 ? 4 : 2;
  // Parts of the columns of the results, each of other warps, where one warp has no registers for all.
  static constexpr int PARTS = SIZE <= 128 ? 1 : 2;
  static constexpr int M = HALF && SIZE <= 64 ? 2 : 1;
  static constexpr int WARPS = ROW_WARPS * PARTS;
  static constexpr int ROWS = ROW_WARPS * M * 16;
  static constexpr int N = HALF ? (SIZE > 64 && SIZE <= 128 ? 64 : 32) : (SIZE <= 128 ? 32 : 16);
  static constexpr int STAGES_ = SIZE <= (HALF ? 128 : 64) ? 2 : 1;
  static constexpr int ROW_BYTES = Tile<T, SIZE>::ROW_BYTES;
  static constexpr int BYTES = (2 * ROWS + STAGES_ * 2 * N) * ROW_BYTES + STAGES_ * 2 * N * 4;
};
static_assert(bytes_are<KeySizes, __half>(49664, 99328, 99328, 98560) &&
                  bytes_are<KeySizes, float>(66048, 73984, 98560, 98432),
              "the host asks for as much shared memory");

template <typename T, int SIZE> __device__ void attention_keys(const AttentionParams &p, uint8_t *memory) {
  using Sizes = KeySizes<T, SIZE>;
  using Rows = Tile<T, SIZE>;
  constexpr int M = Sizes::M, N = Sizes::N, BLOCKS = N / 8, WIDE = SIZE / 8 / Sizes::PARTS, COPIERS = Sizes::WARPS * 32;
  constexpr int STAGES_ = Sizes::STAGES_;
  const uint32_t k_tile = shared_address(memory), v_tile = k_tile + Sizes::ROWS * Rows::ROW_BYTES;
  const uint32_t stages = v_tile + Sizes::ROWS * Rows::ROW_BYTES;
  const auto q_tile = [&](int turn) { return stages + turn % STAGES_ * 2 * N * Rows::ROW_BYTES; };
  const auto o_tile = [&](int turn) { return q_tile(turn) + N * Rows::ROW_BYTES; };
  float2(*statistics)[N] = reinterpret_cast<float2(*)[N]>(memory + (2 * Sizes::ROWS + STAGES_ * 2 * N) * Rows::ROW_BYTES);

  const uint32_t key_heads = p.heads / p.group, index = blockIdx.x % (p.batch * key_heads);
  const Head key_head = {index / key_heads, index % key_heads};
  // With a mask the first keys are seen by the most queries: they come first.
  const int key0 = blockIdx.x / (p.batch * key_heads) * Sizes::ROWS, keys = min(Sizes::ROWS, (int)p.keys - key0);
  const T *k = (const T *)p.k + offset(p.k_strides, key_head.batch, key_head.head) + key0 * p.k_strides.time;
  const T *v = (const T *)p.v + offset(p.v_strides, key_head.batch, key_head.head) + key0 * p.v_strides.time;
  const Sight sight(p);
  const int2 range = sight.tiles_of_queries<N>(key0, keys, p.queries);
  const int tiles = range.y - range.x, turns = tiles * (int)p.group;
  const int64_t stride = (int64_t)p.heads * p.head_dim;

  // A turn is a tile of queries of one of the heads.
  const auto head_of = [&](int turn) { return Head{key_head.batch, key_head.head * p.group + turn / tiles}; };
  const auto query_of = [&](int turn) { return (range.x + turn % tiles) * N; };
  const auto load = [&](int turn) {
    const Head head = head_of(turn);
    const int query = query_of(turn), queries = (int)p.queries - query;
    const T *q = (const T *)p.q + offset(p.q_strides, head.batch, head.head) + query * p.q_strides.time;
    const T *o = (const T *)p.out_grad + head.contiguous(p, p.queries, p.heads) + query * stride;
    Rows::template load<N, COPIERS>(q_tile(turn), q, p.q_strides.time, queries, p.head_dim);
    Rows::template load<N, COPIERS>(o_tile(turn), o, stride, queries, p.head_dim);
    cp_async_commit();
  };
  // Of the row of a turn that is this thread's: lse in units of ln 2, and delta.
  const auto statistic = [&](int turn) {
    const int query = query_of(turn) + threadIdx.x;
    if (threadIdx.x >= N || query >= (int)p.queries) return make_float2(INFINITY, 0.f);
    const int64_t at = head_of(turn).rows(p) + query;
    return make_float2(p.lse[at] * LOG2E, p.delta[at]);
  };
  const auto keep = [&](int turn, float2 statistic) {
    if (threadIdx.x < N) statistics[turn % STAGES_][threadIdx.x] = statistic;
  };
  static_assert(COPIERS >= N, "a thread a row");

  Rows::template load<Sizes::ROWS, COPIERS>(k_tile, k, p.k_strides.time, keys, p.head_dim);
  Rows::template load<Sizes::ROWS, COPIERS>(v_tile, v, p.v_strides.time, keys, p.head_dim);
  cp_async_commit();
  if (turns > 0) {
    load(0);
    keep(0, statistic(0));
  }

  const int warp_row = threadIdx.x / 32 % Sizes::ROW_WARPS * M * 16;
  const int column = threadIdx.x / 32 / Sizes::ROW_WARPS * WIDE * 8;
  float k_grad[M][WIDE][4], v_grad[M][WIDE][4];
  clear(k_grad);
  clear(v_grad);
  for (int turn = 0; turn < turns; turn++) {
    cp_async_wait<0>();
    __syncthreads();
    const bool more = turn + 1 < turns;
    float2 next = make_float2(0.f, 0.f);
    if (STAGES_ == 2 && more) {
      load(turn + 1);
      next = statistic(turn + 1);
    }
    // Keys by queries.
    float scores[M][BLOCKS][4], gradients[M][BLOCKS][4];
    multiply_rows<T, SIZE>(scores, k_tile, warp_row, q_tile(turn));
    multiply_rows<T, SIZE>(gradients, v_tile, warp_row, o_tile(turn));
    const int query = query_of(turn);
    softmax_gradient(
        p, scores, gradients,
        [&](int, int n, int i) { return statistics[turn % STAGES_][n * 8 + column_of(i)]; },
        sight.all(query, N, key0, Sizes::ROWS),
        [&](int m, int n, int i) { return sight.sees(query + n * 8 + column_of(i), key0 + warp_row + m * 16 + row_of(i)); });
    multiply_columns<T, SIZE>(v_grad, scores, o_tile(turn), column);
    multiply_columns<T, SIZE>(k_grad, gradients, q_tile(turn), column);
    if (STAGES_ == 1 && more) {
      __syncthreads();
      load(turn + 1);
      next = statistic(turn + 1);
    }
    if (more) keep(turn + 1, next);
  }
  cp_async_wait<0>();
  const int64_t key_stride = (int64_t)key_heads * p.head_dim;
  const int64_t to = key_head.contiguous(p, p.keys, key_heads) + (key0 + warp_row) * key_stride;
  store(k_grad, p.scale, (T *)p.k_grad + to, key_stride, keys - warp_row, column, p.head_dim);
  store(v_grad, 1.f, (T *)p.v_grad + to, key_stride, keys - warp_row, column, p.head_dim);
}

// ---------------------------------------------------------------- queries

template <typename T, int SIZE> struct QuerySizes {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int M = HALF && SIZE <= 64 ? 2 : 1;
  static constexpr int WARPS = HALF || SIZE <= 128 ? 4 : 2;
  static constexpr int ROWS = WARPS * M * 16;
  static constexpr int N = HALF ? (SIZE <= 128 ? 64 : 32) : (SIZE <= 128 ? 32 : 16);
  static constexpr int STAGES_ = SIZE <= (HALF ? 128 : 64) ? 2 : 1;
  static constexpr int ROW_BYTES = Tile<T, SIZE>::ROW_BYTES;
  static constexpr int BYTES = (2 * ROWS + STAGES_ * 2 * N) * ROW_BYTES;
};
static_assert(bytes_are<QuerySizes, __half>(65536, 98304, 98304, 98304) &&
                  bytes_are<QuerySizes, float>(65536, 73728, 98304, 98304),
              "the host asks for as much shared memory");

template <typename T, int SIZE> __device__ void attention_queries(const AttentionParams &p, uint8_t *memory) {
  using Sizes = QuerySizes<T, SIZE>;
  using Rows = Tile<T, SIZE>;
  constexpr int M = Sizes::M, N = Sizes::N, BLOCKS = N / 8, COPIERS = Sizes::WARPS * 32, STAGES_ = Sizes::STAGES_;
  const uint32_t q_tile = shared_address(memory), o_tile = q_tile + Sizes::ROWS * Rows::ROW_BYTES;
  const uint32_t stages = o_tile + Sizes::ROWS * Rows::ROW_BYTES;
  const auto k_tile = [&](int tile) { return stages + tile % STAGES_ * 2 * N * Rows::ROW_BYTES; };
  const auto v_tile = [&](int tile) { return k_tile(tile) + N * Rows::ROW_BYTES; };

  const uint32_t heads = p.batch * p.heads, tiles = gridDim.x / heads;
  const uint32_t index = blockIdx.x % heads;
  const Head head = {index / p.heads, index % p.heads};
  const int query0 = (tiles - 1 - blockIdx.x / heads) * Sizes::ROWS, queries = min(Sizes::ROWS, (int)p.queries - query0);
  const int64_t stride = (int64_t)p.heads * p.head_dim;
  const int64_t contiguous = head.contiguous(p, p.queries, p.heads) + query0 * stride;
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
  Rows::template load<Sizes::ROWS, COPIERS>(o_tile, (const T *)p.out_grad + contiguous, stride, queries, p.head_dim);
  cp_async_commit();
  if (range.x < range.y) load(range.x);

  const int warp_row = threadIdx.x / 32 * M * 16;
  float2 statistics[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + m * 16 + row_of(2 * half);
      const int64_t at = head.rows(p) + query0 + row;
      statistics[m][half] = row < queries ? make_float2(p.lse[at] * LOG2E, p.delta[at]) : make_float2(INFINITY, 0.f);
    }
  float q_grad[M][SIZE / 8][4];
  clear(q_grad);
  for (int tile = range.x; tile < range.y; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (STAGES_ == 2 && tile + 1 < range.y) load(tile + 1);
    float scores[M][BLOCKS][4], gradients[M][BLOCKS][4];
    multiply_rows<T, SIZE>(scores, q_tile, warp_row, k_tile(tile));
    multiply_rows<T, SIZE>(gradients, o_tile, warp_row, v_tile(tile));
    softmax_gradient(
        p, scores, gradients, [&](int m, int, int i) { return statistics[m][i >> 1]; }, sight.all(query0, queries, tile * N, N),
        [&](int m, int n, int i) {
          return sight.sees(query0 + warp_row + m * 16 + row_of(i), tile * N + n * 8 + column_of(i));
        });
    multiply_columns<T, SIZE>(q_grad, gradients, k_tile(tile), 0);
    if (STAGES_ == 1 && tile + 1 < range.y) {
      __syncthreads();
      load(tile + 1);
    }
  }
  cp_async_wait<0>();
  store(q_grad, p.scale, (T *)p.q_grad + contiguous + warp_row * stride, stride, queries - warp_row, 0, p.head_dim);
}

#define BACKWARD_KERNEL(NAME, SIZES, SUFFIX, T, SIZE)                                                     \
  extern "C" __global__ void __launch_bounds__(SIZES<T, SIZE>::WARPS * 32)                               \
      attention_##NAME##_##SIZE##_##SUFFIX(const AttentionParams p) {                                    \
    extern __shared__ __align__(128) uint8_t memory[];                                                   \
    attention_##NAME<T, SIZE>(p, memory);                                                                \
  }
#define BACKWARD(SUFFIX, T, SIZE)                          \
  BACKWARD_KERNEL(keys, KeySizes, SUFFIX, T, SIZE)         \
  BACKWARD_KERNEL(queries, QuerySizes, SUFFIX, T, SIZE)

#define DELTA(SUFFIX, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(DELTA_THREADS) attention_delta_##SUFFIX(const AttentionParams p) {      \
    attention_delta<T>(p);                                                                                             \
  }
