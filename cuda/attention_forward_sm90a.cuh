// The forward of attention on Hopper: out = softmax(mask(cap(scale q k^T))) v, and the log-sum-exp of each row.
//
// As in Shah et al., FlashAttention-3, arXiv 2407.08608: one warp copies, groups of warps have 64 queries each and take
// turns at the tensor cores, and a group works off one tile's scores while its products of the tile before are under way.
#pragma once
#include "attention_sm90a.cuh"

namespace hopper {

template <int SIZE_>
struct ForwardPlan {
  static constexpr int SIZE = SIZE_;
  // Smaller heads have fewer sums to keep: three groups fit the registers.
  static constexpr int GROUPS = SIZE == 64 ? 3 : 2;
  static constexpr int ROWS = 64 * GROUPS;
  static constexpr int KEYS = 128;
  static constexpr int THREADS = GROUP * (1 + GROUPS);
  static constexpr int PRODUCER_REGISTERS = GROUPS == 3 ? 32 : 24;
  static constexpr int CONSUMER_REGISTERS = GROUPS == 3 ? 160 : 240;
  using Queries = HeadTile<ROWS, SIZE>;
  using Keys = HeadTile<KEYS, SIZE>;

  Slots<Queries::BYTES, 1> queries;
  Slots<Keys::BYTES, 2> keys, values;
};

static_assert(sizeof(ForwardPlan<64>) == 93184 && sizeof(ForwardPlan<128>) == 166912,
              "the host asks for as much shared memory");

template <class Plan>
__device__ void forward_produce(Plan& plan, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                                const AttentionParams& p) {
  Place queries(plan.queries);
  Place keys(plan.keys), values(plan.values);
  const Sight sight(p);
  for (uint32_t n = 0; dealt(n) < QueryItem::count(p, Plan::ROWS); ++n) {
    const QueryItem item(p, Plan::ROWS, dealt(n));
    const Head& head = item.head;
    const int key_head = head.head / p.group;
    queries.claim(Plan::Queries::BYTES);
    Plan::Queries::copy(queries.slot(), q_map, item.query, head.head, head.batch, queries.full());
    queries.at.next();
    const int2 range = sight.tiles_of_keys<Plan::KEYS>(item.query, item.queries);
    for (int tile = range.y - 1; tile >= range.x; --tile) {
      keys.claim(Plan::Keys::BYTES);
      Plan::Keys::copy(keys.slot(), k_map, tile * Plan::KEYS, key_head, head.batch, keys.full());
      keys.at.next();
      values.claim(Plan::Keys::BYTES);
      Plan::Keys::copy(values.slot(), v_map, tile * Plan::KEYS, key_head, head.batch, values.full());
      values.at.next();
    }
  }
}

// The running maximum and sum of a thread's two rows; the sum is of the thread's own columns.
struct RunningRows {
  float max[2] = {MASKED, MASKED}, sum[2] = {0.0f, 0.0f};

  // Scores become probabilities of the maximum so far, and `rescale` what sums up to now are multiplied by.
  template <int N>
  __device__ __forceinline__ void add(float (&scores)[N], float (&rescale)[2], float to_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = max[half], odd = scores[2 * half + 1];
#pragma unroll
      for (int i = 2 * half; i < N; i += 4) even = fmaxf(even, scores[i]), odd = fmaxf(odd, scores[i + 1]);
      float larger = fmaxf(even, odd);
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 2));
      // Until a key is seen nothing is subtracted: MASKED less its rounded product would be far from 0, not 0.
      rescale[half] = exp2_fast((max[half] - larger) * to_log2);
      const float subtracted = larger == MASKED ? 0.0f : larger * to_log2;
      max[half] = larger;
      float sum_even = sum[half] * rescale[half], sum_odd = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < N; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], to_log2, -subtracted));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], to_log2, -subtracted));
        sum_even += scores[i], sum_odd += scores[i + 1];
      }
      sum[half] = sum_even + sum_odd;
    }
  }
};

template <typename T, class Plan>
__device__ void forward_consume(Plan& plan, int group, const AttentionParams& p) {
  constexpr int SIZE = Plan::SIZE, KEYS = Plan::KEYS, GROUPS = Plan::GROUPS;
  Place queries(plan.queries);
  Place keys(plan.keys), values(plan.values);
  const Sight sight(p);
  const bool capped = p.softcap > 0.0f;
  // From a product, or what the softcap's tanh makes of it, to a logit in units of ln 2.
  const float to_log2 = (capped ? p.softcap : p.scale) * LOG2E;
  const int next = group + 1 == GROUPS ? 0 : group + 1;
  if (next == 0) give_turn(0);

  for (uint32_t n = 0; dealt(n) < QueryItem::count(p, Plan::ROWS); ++n) {
    const QueryItem item(p, Plan::ROWS, dealt(n));
    const int2 range = sight.tiles_of_keys<KEYS>(item.query, item.queries);
    const int query = item.query + group * 64;
    RunningRows rows;
    float out[SIZE / 2], scores[KEYS / 2], rescale[2];
    uint32_t probabilities[KEYS / 4];
    const auto to_probabilities = [&](int tile) {
      if (capped) soften(scores, p.scale / p.softcap);
      if (!sight.all(query, 64, tile * KEYS, KEYS)) mask_keys(scores, sight, query, tile * KEYS);
      rows.add(scores, rescale, to_log2);
    };
    const auto issue_scores = [&] {
      keys.wait();
      take_turn(group);
      wgmma_fence();
      multiply_rows<T, SIZE, Plan::ROWS, KEYS>(scores, queries.slot() + group * BOX_BYTES, keys.slot());
      wgmma_commit();
    };
    const auto release_keys = [&] {
      settle(scores);
      keys.release();
      keys.at.next();
    };
    const auto issue_out = [&] {
      values.wait();
      wgmma_fence();
      multiply_columns<T, SIZE, KEYS>(out, probabilities, values.slot());
      wgmma_commit();
    };
    const auto release_values = [&] {
      settle(out);
      values.release();
      values.at.next();
    };

    clear(out);
    queries.wait();
    issue_scores();
    give_turn(next);
    wgmma_wait<0>();
    release_keys();
    to_probabilities(range.y - 1);
    round_pairs<T>(probabilities, scores);
    for (int tile = range.y - 2; tile >= range.x; --tile) {
      issue_scores();
      issue_out();
      give_turn(next);
      wgmma_wait<1>();
      release_keys();
      to_probabilities(tile);
      wgmma_wait<0>();
      release_values();
#pragma unroll
      for (int i = 0; i < SIZE / 2; ++i) out[i] *= rescale[i / 2 % 2];
      round_pairs<T>(probabilities, scores);
    }
    queries.release();
    queries.at.next();
    issue_out();
    wgmma_wait<0>();
    release_values();

    float inverse[2];
    const int row = query + thread_row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = rows.sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      inverse[half] = 1.0f / total;
      if (threadIdx.x % 4 == 0 && row + 8 * half < p.queries)
        p.lse[item.head.rows(p) + row + 8 * half] = rows.max[half] * to_log2 * LN2 + logf(total);
    }
    const int64_t stride = (int64_t)p.heads * p.head_dim;
    T* to = (T*)p.out + item.head.contiguous(p, p.queries, p.heads) + query * stride;
    store_rows<T>(out, inverse, to, stride, (int)p.queries - query, p.head_dim);
  }
  // The last turn handed on.
  if (group == 0) take_turn(0);
}

template <typename T, class Plan>
__device__ __forceinline__ void forward(const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                                        const AttentionParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<Plan*>(shared);
  if (threadIdx.x == 0) {
    prefetch_map(q_map);
    prefetch_map(k_map);
    prefetch_map(v_map);
    plan.queries.init(Plan::GROUPS);
    plan.keys.init(Plan::GROUPS);
    plan.values.init(Plan::GROUPS);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < GROUP) {
    shrink_registers<Plan::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) forward_produce(plan, q_map, k_map, v_map, p);
  } else {
    grow_registers<Plan::CONSUMER_REGISTERS>();
    forward_consume<T>(plan, uniform(threadIdx.x / GROUP - 1), p);
  }
}

#define FORWARD(SUFFIX, T, SIZE)                                                                                  \
  extern "C" __global__ void __launch_bounds__(hopper::ForwardPlan<SIZE>::THREADS, 1)                             \
      attention_sm90a_forward_##SIZE##_##SUFFIX(const __grid_constant__ hopper::TensorMap q,                      \
                                                const __grid_constant__ hopper::TensorMap k,                      \
                                                const __grid_constant__ hopper::TensorMap v,                      \
                                                const __grid_constant__ AttentionParams p) {                      \
    hopper::forward<T, hopper::ForwardPlan<SIZE>>(&q, &k, &v, p);                                                 \
  }

}  // namespace hopper
