// The gradients of attention on Hopper. As in the portable kernels (attention_backward.cuh, with the formulas) one kernel
// has tiles of keys and one tiles of queries, both compute P again, and nothing is added to in memory.
//
// A group issues the next product before it works off the last one: P is formed while dP is computed, dZ while dV is, and
// the next tile's scores are asked for while dK or dQ is under way. What is left the products of the other group cover.
#pragma once
#include "attention_sm90a.cuh"

namespace hopper {

constexpr int GROUPS = 2;
constexpr int ROWS = 64 * GROUPS;  // of a block's stationary tile

// ---------------------------------------------------------------------------------------------------------
// Statistics
// ---------------------------------------------------------------------------------------------------------

constexpr int STATISTICS_THREADS = 256;

// lse in units of ln 2 and delta of each row; inf and 0 for the rows that only round the queries up, so that their
// probabilities are 0. LANES lanes read a row of `out`, 16 bytes each.
template <typename T, int SIZE>
__device__ __forceinline__ void statistics(const AttentionParams& p) {
  constexpr uint32_t LANES = SIZE / 8;
  const int64_t padded = statistics_rows(p), index = ((int64_t)blockIdx.x * STATISTICS_THREADS + threadIdx.x) / LANES;
  if (index >= p.batch * padded * p.heads) return;
  const uint32_t lane = threadIdx.x % LANES, head = index % p.heads;
  const int64_t position = index / p.heads, batch = position / padded, query = position % padded;
  float sum = 0.0f;
  if (query < p.queries && lane * 8 < p.head_dim) {
    const int64_t at = ((batch * p.queries + query) * p.heads + head) * p.head_dim + lane * 8;
    const uint4 o = *reinterpret_cast<const uint4*>((const T*)p.out + at);
    const uint4 g = *reinterpret_cast<const uint4*>((const T*)p.out_grad + at);
    const uint32_t of_o[4] = {o.x, o.y, o.z, o.w}, of_g[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(of_o[i]), b = unpack<T>(of_g[i]);
      sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
  }
#pragma unroll
  for (int i = LANES / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (lane != 0) return;
  const int64_t row = batch * p.heads + head, to = row * padded + query;
  p.log2_lse[to] = query < p.queries ? p.lse[row * p.queries + query] * LOG2E : INFINITY;
  p.delta[to] = sum;
}

// ---------------------------------------------------------------------------------------------------------
// What both kernels do to scores
// ---------------------------------------------------------------------------------------------------------

// Products of queries and keys become probabilities. `mask` takes away what is not seen, `log2_lse(i)` is that of the rows
// of numbers i and i + 1. With a softcap they are by its slope, and `packed` (if asked for) holds them without.
template <typename T, bool PACK, int N, class Mask, class Lse>
__device__ __forceinline__ void probabilities(float (&scores)[N], uint32_t (&packed)[N / 2], const AttentionParams& p,
                                              Mask mask, Lse log2_lse) {
  const bool capped = p.softcap > 0.0f;
  const float to_log2 = (capped ? p.softcap : p.scale) * LOG2E;
  if (capped) soften(scores, p.scale / p.softcap);
  mask(scores);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float2 lse = log2_lse(i);
    const float z0 = scores[i], z1 = scores[i + 1];
    scores[i] = exp2_fast(fmaf(z0, to_log2, -lse.x)), scores[i + 1] = exp2_fast(fmaf(z1, to_log2, -lse.y));
    if (PACK) packed[i / 2] = pack<T>(scores[i], scores[i + 1]);
    if (capped) {
      // What is masked is far from a tanh, and its probability 0.
      scores[i] *= fmaxf(fmaf(-z0, z0, 1.0f), 0.0f), scores[i + 1] *= fmaxf(fmaf(-z1, z1, 1.0f), 0.0f);
    }
  }
}

// The gradients of scale * products, rounded.
template <typename T, int N, class Delta>
__device__ __forceinline__ void score_gradients(uint32_t (&packed)[N / 2], const float (&scores)[N],
                                                const float (&gradients)[N], Delta delta) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float2 by = delta(i);
    packed[i / 2] = pack<T>(scores[i] * (gradients[i] - by.x), scores[i + 1] * (gradients[i + 1] - by.y));
  }
}

// ---------------------------------------------------------------------------------------------------------
// Keys and values
// ---------------------------------------------------------------------------------------------------------

template <int SIZE_>
struct KeyPlan {
  static constexpr int SIZE = SIZE_;
  // A product of 64 columns takes as long to read from shared memory as to multiply, but larger heads leave no registers for
  // more.
  static constexpr int QUERIES = SIZE == 64 ? 128 : 64;
  using Kept = HeadTile<ROWS, SIZE>;
  using Passing = HeadTile<QUERIES, SIZE>;
  static constexpr int OUT_GRAD = Passing::BYTES, LSE = 2 * Passing::BYTES, DELTA = LSE + QUERIES * 4;
  static constexpr int SLOT_BYTES = DELTA + QUERIES * 4;

  Slots<2 * Kept::BYTES, 1> kept;  // keys, values
  Slots<SLOT_BYTES, 4> passing;    // queries, gradients of out, lse, delta
};

static_assert(sizeof(KeyPlan<64>) == 169984 && sizeof(KeyPlan<128>) == 202752,
              "the host asks for as much shared memory");

// The tiles of queries that a tile of keys goes through, of one head after the other of those that share the keys.
template <int QUERIES>
struct Turns {
  int first, tiles, count;

  __device__ __forceinline__ Turns(const AttentionParams& p, const KeyItem& item) {
    const int2 range = Sight(p).tiles_of_queries<QUERIES>(item.key, item.keys, p.queries);
    first = range.x, tiles = range.y - range.x, count = tiles * p.group;
  }
};

template <class Plan>
__device__ void keys_produce(Plan& plan, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                             const TensorMap* o_map, const AttentionParams& p) {
  constexpr int QUERIES = Plan::QUERIES;
  Place kept(plan.kept);
  Place passing(plan.passing);
  for (uint32_t n = 0; dealt(n) < KeyItem::count(p, ROWS); ++n) {
    const KeyItem item(p, ROWS, dealt(n));
    const int batch = item.head.batch;
    kept.claim(2 * Plan::Kept::BYTES);
    Plan::Kept::copy(kept.slot(), k_map, item.key, item.head.head, batch, kept.full());
    Plan::Kept::copy(kept.slot() + Plan::Kept::BYTES, v_map, item.key, item.head.head, batch, kept.full());
    kept.at.next();
    const Turns<QUERIES> turns(p, item);
    for (int in_group = 0; in_group < p.group; ++in_group) {
      const Head head = {item.head.batch, item.head.head * p.group + in_group};
      for (int tile = turns.first; tile < turns.first + turns.tiles; ++tile) {
        const int query = tile * QUERIES;
        const uint32_t to = passing.slot(), full = passing.full();
        passing.claim(Plan::SLOT_BYTES);
        Plan::Passing::copy(to, q_map, query, head.head, batch, full);
        Plan::Passing::copy(to + Plan::OUT_GRAD, o_map, query, head.head, batch, full);
        const int64_t row = statistics_of(p, head) + query;
        copy_bytes(to + Plan::LSE, p.log2_lse + row, QUERIES * 4, full);
        copy_bytes(to + Plan::DELTA, p.delta + row, QUERIES * 4, full);
        passing.at.next();
      }
    }
  }
}

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

template <typename T, class Plan>
__device__ void keys_consume(Plan& plan, int group, const AttentionParams& p) {
  constexpr int SIZE = Plan::SIZE, QUERIES = Plan::QUERIES;
  Place kept(plan.kept);
  Place passing(plan.passing);
  const Sight sight(p);
  for (uint32_t n = 0; dealt(n) < KeyItem::count(p, ROWS); ++n) {
    const KeyItem item(p, ROWS, dealt(n));
    const Turns<QUERIES> turns(p, item);
    const int key = item.key + group * 64;
    float k_grad[SIZE / 2], v_grad[SIZE / 2];
    clear(k_grad);
    clear(v_grad);
    const uint32_t k_tile = kept.slot() + group * BOX_BYTES, v_tile = k_tile + Plan::Kept::BYTES;
    uint32_t read = 0;  // the barrier of the slot of the turn before
    int tile = 0;
    kept.wait();
    for (int turn = 0; turn < turns.count; ++turn) {
      const uint32_t q_tile = passing.slot(), o_tile = q_tile + Plan::OUT_GRAD;
      const uint32_t of_columns = q_tile + thread_column() * 4;
      const int query = (turns.first + tile) * QUERIES;
      // Keys by queries.
      float scores[QUERIES / 2], gradients[QUERIES / 2];
      uint32_t packed[QUERIES / 4];
      passing.wait();
      wgmma_fence();
      multiply_rows<T, SIZE, ROWS, QUERIES>(scores, k_tile, q_tile);
      wgmma_commit();
      // The product before is done, and its operands are free.
      wgmma_wait<1>();
      if (turn > 0) passing.release(read);
      wgmma_fence();
      multiply_rows<T, SIZE, ROWS, QUERIES>(gradients, v_tile, o_tile);
      wgmma_commit();
      wgmma_wait<1>();
      settle(scores);
      probabilities<T, true>(
          scores, packed, p,
          [&](float(&z)[QUERIES / 2]) {
            if (!sight.all(query, QUERIES, key, 64)) mask_queries(z, sight, key, query);
          },
          [&](int i) { return load_pair(of_columns + Plan::LSE + i / 4 * 32); });
      wgmma_fence();
      multiply_columns<T, SIZE, QUERIES>(v_grad, packed, o_tile);
      wgmma_commit();
      wgmma_wait<1>();
      settle(gradients);
      uint32_t packed_gradients[QUERIES / 4];
      score_gradients<T>(packed_gradients, scores, gradients,
                         [&](int i) { return load_pair(of_columns + Plan::DELTA + i / 4 * 32); });
      wgmma_fence();
      multiply_columns<T, SIZE, QUERIES>(k_grad, packed_gradients, q_tile);
      wgmma_commit();
      // So that the registers of `packed` are free.
      wgmma_wait<1>();
      read = passing.empty();
      passing.at.next();
      if (++tile == turns.tiles) tile = 0;
    }
    wgmma_wait<0>();
    settle(k_grad);
    settle(v_grad);
    if (turns.count > 0) passing.release(read);
    kept.release();
    kept.at.next();
    const uint32_t key_heads = p.heads / p.group;
    const int64_t stride = (int64_t)key_heads * p.head_dim;
    const int64_t to = item.head.contiguous(p, p.keys, key_heads) + key * stride;
    const float by_scale[2] = {p.scale, p.scale}, as_is[2] = {1.0f, 1.0f};
    store_rows<T>(k_grad, by_scale, (T*)p.k_grad + to, stride, (int)p.keys - key, p.head_dim);
    store_rows<T>(v_grad, as_is, (T*)p.v_grad + to, stride, (int)p.keys - key, p.head_dim);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Queries
// ---------------------------------------------------------------------------------------------------------

template <int SIZE_>
struct QueryPlan {
  static constexpr int SIZE = SIZE_;
  static constexpr int KEYS = 128;
  using Kept = HeadTile<ROWS, SIZE>;
  using Passing = HeadTile<KEYS, SIZE>;

  Slots<2 * Kept::BYTES, 1> kept;        // queries, gradients of out
  Slots<2 * Passing::BYTES, 2> passing;  // keys, values
};

static_assert(sizeof(QueryPlan<64>) == 100352 && sizeof(QueryPlan<128>) == 198656,
              "the host asks for as much shared memory");

template <class Plan>
__device__ void queries_produce(Plan& plan, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                                const TensorMap* o_map, const AttentionParams& p) {
  Place kept(plan.kept);
  Place passing(plan.passing);
  const Sight sight(p);
  for (uint32_t n = 0; dealt(n) < QueryItem::count(p, ROWS); ++n) {
    const QueryItem item(p, ROWS, dealt(n));
    const Head& head = item.head;
    const int key_head = head.head / p.group;
    kept.claim(2 * Plan::Kept::BYTES);
    Plan::Kept::copy(kept.slot(), q_map, item.query, head.head, head.batch, kept.full());
    Plan::Kept::copy(kept.slot() + Plan::Kept::BYTES, o_map, item.query, head.head, head.batch, kept.full());
    kept.at.next();
    const int2 range = sight.tiles_of_keys<Plan::KEYS>(item.query, item.queries);
    for (int tile = range.x; tile < range.y; ++tile) {
      const uint32_t to = passing.slot(), full = passing.full();
      passing.claim(2 * Plan::Passing::BYTES);
      Plan::Passing::copy(to, k_map, tile * Plan::KEYS, key_head, head.batch, full);
      Plan::Passing::copy(to + Plan::Passing::BYTES, v_map, tile * Plan::KEYS, key_head, head.batch, full);
      passing.at.next();
    }
  }
}

template <typename T, class Plan>
__device__ void queries_consume(Plan& plan, int group, const AttentionParams& p) {
  constexpr int SIZE = Plan::SIZE, KEYS = Plan::KEYS;
  Place kept(plan.kept);
  Place passing(plan.passing);
  const Sight sight(p);
  for (uint32_t n = 0; dealt(n) < QueryItem::count(p, ROWS); ++n) {
    const QueryItem item(p, ROWS, dealt(n));
    const int2 range = sight.tiles_of_keys<KEYS>(item.query, item.queries);
    const int query = item.query + group * 64;
    const int64_t row = statistics_of(p, item.head) + query + thread_row();
    const float log2_lse[2] = {p.log2_lse[row], p.log2_lse[row + 8]}, delta[2] = {p.delta[row], p.delta[row + 8]};
    float q_grad[SIZE / 2];
    clear(q_grad);
    const uint32_t q_tile = kept.slot() + group * BOX_BYTES, o_tile = q_tile + Plan::Kept::BYTES;
    uint32_t read = 0;
    kept.wait();
    for (int tile = range.x; tile < range.y; ++tile) {
      const uint32_t k_tile = passing.slot(), v_tile = k_tile + Plan::Passing::BYTES;
      float scores[KEYS / 2], gradients[KEYS / 2];
      uint32_t packed[KEYS / 4];
      passing.wait();
      wgmma_fence();
      multiply_rows<T, SIZE, ROWS, KEYS>(scores, q_tile, k_tile);
      wgmma_commit();
      // The gradients' registers are those that the product before still reads.
      wgmma_wait<1>();
      if (tile > range.x) passing.release(read);
      wgmma_fence();
      multiply_rows<T, SIZE, ROWS, KEYS>(gradients, o_tile, v_tile);
      wgmma_commit();
      wgmma_wait<1>();
      settle(scores);
      probabilities<T, false>(
          scores, packed, p,
          [&](float(&z)[KEYS / 2]) {
            if (!sight.all(query, 64, tile * KEYS, KEYS)) mask_keys(z, sight, query, tile * KEYS);
          },
          [&](int i) { return make_float2(log2_lse[i / 2 % 2], log2_lse[i / 2 % 2]); });
      wgmma_wait<0>();
      settle(gradients);
      score_gradients<T>(packed, scores, gradients, [&](int i) { return make_float2(delta[i / 2 % 2], delta[i / 2 % 2]); });
      wgmma_fence();
      multiply_columns<T, SIZE, KEYS>(q_grad, packed, k_tile);
      wgmma_commit();
      read = passing.empty();
      passing.at.next();
    }
    wgmma_wait<0>();
    settle(q_grad);
    passing.release(read);
    kept.release();
    kept.at.next();
    const int64_t stride = (int64_t)p.heads * p.head_dim;
    T* to = (T*)p.q_grad + item.head.contiguous(p, p.queries, p.heads) + query * stride;
    const float by_scale[2] = {p.scale, p.scale};
    store_rows<T>(q_grad, by_scale, to, stride, (int)p.queries - query, p.head_dim);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------

template <class Plan, class Produce, class Consume>
__device__ __forceinline__ void backward(Produce produce, Consume consume) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<Plan*>(shared);
  if (threadIdx.x == 0) {
    plan.kept.init(GROUPS);
    plan.passing.init(GROUPS);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < GROUP) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(plan);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    consume(plan, static_cast<int>(uniform(threadIdx.x / GROUP - 1)));
  }
}

#define BACKWARD_KERNEL(NAME, PLAN, SUFFIX, T, SIZE)                                                                \
  extern "C" __global__ void __launch_bounds__(hopper::THREADS, 1) attention_sm90a_##NAME##_##SIZE##_##SUFFIX(      \
      const __grid_constant__ hopper::TensorMap q, const __grid_constant__ hopper::TensorMap k,                     \
      const __grid_constant__ hopper::TensorMap v, const __grid_constant__ hopper::TensorMap out_grad,              \
      const __grid_constant__ AttentionParams p) {                                                                  \
    using Plan = hopper::PLAN<SIZE>;                                                                                \
    hopper::backward<Plan>([&](Plan& plan) { hopper::NAME##_produce(plan, &q, &k, &v, &out_grad, p); },             \
                           [&](Plan& plan, int group) { hopper::NAME##_consume<T>(plan, group, p); });              \
  }
#define BACKWARD(SUFFIX, T, SIZE)                                                                        \
  BACKWARD_KERNEL(keys, KeyPlan, SUFFIX, T, SIZE)                                                        \
  BACKWARD_KERNEL(queries, QueryPlan, SUFFIX, T, SIZE)                                                   \
  extern "C" __global__ void __launch_bounds__(hopper::STATISTICS_THREADS)                               \
      attention_sm90a_statistics_##SIZE##_##SUFFIX(const __grid_constant__ AttentionParams p) {          \
    hopper::statistics<T, SIZE>(p);                                                                      \
  }

}  // namespace hopper
