// Forward of the loss on Hopper: Z = E C^T tile by tile, and of each tile only what the loss needs leaves the
// registers: the running (max, sum exp) of every row, the logit of its target and, for the gradient filter, the
// largest logit and the sum of exponentials per row and 128 classes. Bias, softcap and the mask of the last classes are applied on the way.
// N x V logits would be 4 GB and a second pass over memory; this way the epilogue hides behind the products.
#pragma once
#include "logits_sm90a.cuh"

using namespace hopper;

constexpr int TILE_N = 192;               // classes of a tile
constexpr int BLOCKS = 2;                 // of a cluster: different rows, the same classes
constexpr int PANEL = BLOCKS * TILE_M;    // rows of a work item
constexpr int STAGES = 5;
constexpr uint32_t PACE_K = 8 * BLOCK_K;  // depth between two looks at how far the other blocks are
constexpr int KEEP = 128;                 // classes of a tile of the filter, as the backward's tiles are wide
constexpr int UNIT = 64;                  // two units to such a tile, three to one of the forward

// Everything but the two matrices; mirrored on the host. Rows are those of the group the embeddings' map covers,
// whose boxes are 64 high; those of the classifier's map are 96 high, half a tile.
struct ForwardParams {
  const uint32_t* count;      // [1] compacted rows in all
  const int32_t* row_target;  // [rows] class, or negative: none
  const void* bias;           // [vocab] T, or null
  float2* partials;           // [splits][rows] (max, sum exp(z - max)); (-inf, 0) if every logit is -inf
  float2* extra;              // [splits][rows] (sum exp(z - max) (z - max), the class of max as bits); where OUTPUTS
  float* target_logit;        // [rows] written where the target is a class
  uint32_t* pace;             // [1] zero, or null: keeps blocks that share operands together; a hint
  uint32_t* statistics;       // [ceil(vocab / 128)][rows] as pack_statistics; or null
  uint32_t first_row;         // compacted row that row 0 of the group is
  uint32_t rows;              // rows of the group at most, and the leading dimension of the outputs
  uint32_t vocab;
  uint32_t hidden;
  uint32_t adapter_column;    // from which on columns of the classifier are its adapter's, a multiple of 64; or beyond all
  uint32_t splits;            // ceil(tiles of 192 classes / tiles_per_split)
  uint32_t tiles_per_split;   // even, so that a split starts at a multiple of 128 classes
  uint32_t raster;            // panels of 256 rows that walk the classes together
  float softcap;              // <= 0: none
  float logit_scale;
};

// The two groups take turns at the tensor cores, each with stages of its own ("ping-pong"): the work on one
// tile's logits hides behind the other's products. Both have the same rows, and each its own split of the
// classes: rows are wanted again and again and stay in L2, classes pass through once. The classes of a stage go
// to both blocks of the cluster.
struct ForwardPlan {
  Ring<TILE_M, TILE_N, STAGES, Share::B> ring;
  alignas(16) float bias[CONSUMERS][TILE_N];
};

// A work item of a cluster: 256 rows by two splits of the classes, one a group. Items that run at the same time
// share `raster` panels of rows and neighbouring classes, so both operands come from L2.
struct ForwardItems {
  uint32_t rows, panels, tiles, pairs, count;
  uint32_t first_row;  // of this block
  uint32_t pair;

  __device__ explicit ForwardItems(const ForwardParams& p) {
    uint32_t all = *p.count;
    rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
    panels = (rows + PANEL - 1) / PANEL;
    tiles = (p.vocab + TILE_N - 1) / TILE_N;
    pairs = (p.splits + CONSUMERS - 1) / CONSUMERS;
    count = panels * pairs;
  }
  __device__ void decode(const ForwardParams& p, uint32_t item) {
    uint32_t band = item / (p.raster * pairs);
    uint32_t inside = item - band * p.raster * pairs;
    uint32_t height = min(p.raster, panels - band * p.raster);
    first_row = (band * p.raster + inside % height) * PANEL + cluster_rank() * TILE_M;
    pair = inside / height;
  }
  __device__ uint32_t split(uint32_t group) const { return pair * CONSUMERS + group; }
  __device__ uint32_t first_tile(const ForwardParams& p, uint32_t group) const {
    return min(split(group) * p.tiles_per_split, tiles);
  }
  // Tiles of a group's split; the first group's never has fewer than the second's.
  __device__ uint32_t steps(const ForwardParams& p, uint32_t group) const {
    return min(p.tiles_per_split, tiles - first_tile(p, group));
  }
};

__device__ __forceinline__ uint32_t first_item() { return blockIdx.x / BLOCKS; }
__device__ __forceinline__ uint32_t next_item() { return gridDim.x / BLOCKS; }

__device__ void produce(ForwardPlan& plan, const TensorMap* embeddings, const JoinedMaps& classifier,
                        const ForwardParams& p) {
  ForwardItems items(p);
  Filler ring(plan.ring);
  Pace pace(p.pace);
  const uint32_t paces = (p.hidden + PACE_K - 1) / PACE_K * CONSUMERS * p.tiles_per_split;  // of an item
  uint32_t round = 0;
  for (uint32_t item = first_item(); item < items.count; item += next_item()) {
    items.decode(p, item);
    for (uint32_t step = 0; step < items.steps(p, 0); ++step) {
      for (int group = 0; group < CONSUMERS; ++group) {
        if (step >= items.steps(p, group)) continue;
        const uint32_t first_class = (items.first_tile(p, group) + step) * TILE_N;
        for (uint32_t k = 0; k < p.hidden; k += BLOCK_K) {
          if (k % PACE_K == 0) pace.next();
          copy_block<false, false, TILE_N>(ring, embeddings, items.first_row, k, classifier, first_class, k);
        }
      }
    }
    pace.skip_to(++round * paces);
  }
  pace.skip_to((items.count + next_item() - 1) / next_item() * paces);
}

// What a thread carries from tile to tile: for each of its four rows the (max, sum) over its own columns, and
// the maximum and the sum over the 64 classes at the end of an even tile, whose other half comes with the odd one.
// For entropy and the likeliest class: the sum of its terms by their exponents (in powers of two), and the lowest class
// that has its maximum.
struct RowState {
  float max[4], sum[4], carry[4], carry_sum[4];
  int target[4];
  float weighted[4];
  uint32_t best[4];
};

// Sums are kept in powers of two, relative to 2^base2(max): then a logit costs one fma before its ex2, which
// rounds only the difference, however large the two are. `base2` must round the same way wherever it is formed,
// hence no contraction.
__device__ __forceinline__ float base2(float max) { return __fmul_rn(max, LOG2E); }

// What to measure from: a row of -inf so far is measured from 0.
__device__ __forceinline__ float finite_base2(float max) { return max == -INFINITY ? 0.0f : base2(max); }

__device__ __forceinline__ float term(float logit, float base) { return exp2_fast(fmaf(logit, LOG2E, -base)); }

// The factor of a sum relative to `max` when it is to be relative to `base`.
__device__ __forceinline__ float rescale(float max, float base) {
  return exp2_fast(__fadd_rn(base2(max), -base));
}

// The exponent of a term, which is finite where the term is 0.
__device__ __forceinline__ float exponent(float logit, float base) {
  return fmaxf(fmaf(logit, LOG2E, -base), LEAST_LOG2);
}

// What the terms' exponents change by when a sum relative to `max` is made relative to `base`.
__device__ __forceinline__ float exponent_change(float max, float base) {
  return fmaxf(__fadd_rn(base2(max), -base), LEAST_LOG2);
}

// The few threads that hold a target's logit: keep it, count it, and take it out of the tile, so that the
// statistics are over the other classes.
template <bool OUTPUTS>
__device__ __forceinline__ void take_target(float (&z)[2][TILE_N / 2], RowState& state, int s, int column,
                                            float* target_logit) {
  float logit = 0.0f;
#pragma unroll
  for (int j = 0; j < TILE_N / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& v = z[s / 2][4 * j + 2 * (s % 2) + e];
      if (column == 8 * j + e) logit = v, v = -INFINITY;
    }
  }
  *target_logit = logit;
  const float top = fmaxf(state.max[s], logit), base = finite_base2(top);
  const float to_base = rescale(state.max[s], base);
  if constexpr (OUTPUTS) {
    const float moved = state.weighted[s] + exponent_change(state.max[s], base) * state.sum[s];
    state.weighted[s] = moved * to_base + term(logit, base) * exponent(logit, base);
    // Classes before it have been seen, those of this tile have not.
    if (logit > state.max[s]) state.best[s] = state.target[s];
  }
  state.sum[s] = state.sum[s] * to_base + term(logit, base);
  state.carry_sum[s] *= to_base;
  state.max[s] = top;
}

// The thread's s-th row.
__device__ __forceinline__ uint32_t row_of(uint32_t first_row, int s) {
  return first_row + s / 2 * 64 + s % 2 * 8;
}

// The maximum over the four lanes that share a row.
__device__ __forceinline__ float lanes_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// What four lanes hold of a row in a tile of the filter, each the largest logit and the sum of terms relative to its own
// base, as one number: the largest rounded up to bf16 (low), the sum relative to exp of that (high). A sum that is lost
// because its base is far above is too small to matter.
__device__ __forceinline__ uint32_t pack_statistics(float max, float sum, float base) {
  const uint32_t largest = bf16_up(lanes_max(max));
  const float to = finite_base2(__uint_as_float(largest << 16));
  sum *= exp2_fast(fminf(base - to, 126.0f));
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(sum), "f"(0.0f));
  return packed | largest;
}

template <typename T, bool STATISTICS, bool OUTPUTS>
__device__ void consume(ForwardPlan& plan, uint32_t group, const ForwardParams& p) {
  ForwardItems items(p);
  Drainer ring(plan.ring);
  const uint32_t blocks = (p.hidden + BLOCK_K - 1) / BLOCK_K;
  const uint32_t thread = threadIdx.x % GROUP;
  const uint32_t thread_row = thread / WARP * 16 + thread % WARP / 4;
  const int lane_column = thread % 4 * 2;
  const T* bias = static_cast<const T*>(p.bias);

  for (uint32_t item = first_item(); item < items.count; item += next_item()) {
    items.decode(p, item);
    const uint32_t first_tile = items.first_tile(p, group);
    const uint32_t steps = items.steps(p, group), first_steps = items.steps(p, 0), second_steps = items.steps(p, 1);
    const uint32_t first_row = items.first_row + thread_row;
    RowState state;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      state.max[s] = -INFINITY, state.sum[s] = 0.0f, state.carry[s] = -INFINITY, state.carry_sum[s] = 0.0f;
      state.weighted[s] = 0.0f, state.best[s] = 0;
      state.target[s] = row_of(first_row, s) < items.rows ? p.row_target[row_of(first_row, s)] : -1;
    }

    for (uint32_t step = 0; step < first_steps; ++step) {
      const uint32_t tile = first_tile + step;
      const uint32_t first_class = tile * TILE_N;
      if (bias) stage_bias(plan.bias[group], bias, group, first_class, p.vocab);

      float z[2][TILE_N / 2];
      const bool first_turn = group == 0 && item == first_item() && step == 0;
      const bool last_turn = group == 1 && item + next_item() >= items.count && step + 1 == first_steps;
      auto hand_over = [&] {
        if (!last_turn) give_turn(1 - group);
      };
      if (!first_turn) take_turn(group);
      if (group == 1) ring.at.skip(blocks);  // the first group's
      if (step >= steps) {                   // nothing left of the second group's split
        hand_over();
        continue;
      }
      multiply<T, false, false, TILE_N>(z, ring, blocks, hand_over);
      if (group == 0 && step < second_steps) ring.at.skip(blocks);

      finish_logits(z, bias ? plan.bias[group] : nullptr, p.logit_scale, p.softcap);
      mask_logits<TILE_N>(z, first_class, p.vocab);

#pragma unroll
      for (int s = 0; s < 4; ++s) {
        int column = state.target[s] - static_cast<int>(first_class) - lane_column;
        if (column >= 0 && column < TILE_N && (column & 6) == 0)
          take_target<OUTPUTS>(z, state, s, column, p.target_logit + row_of(first_row, s));
      }
      __syncwarp();

      // Statistics of the block of classes that ends within the tile, and of the one after: of the four lanes that
      // share four rows, each comes to write one.
      uint32_t ready = 0, next = 0;
      const bool even_tile = tile % 2 == 0;
      const bool weigh = STATISTICS && p.softcap > 0.0f;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        float unit[TILE_N / UNIT], mass[TILE_N / UNIT];
#pragma unroll
        for (int u = 0; u < TILE_N / UNIT; ++u) {
          unit[u] = -INFINITY;
#pragma unroll
          for (int i = 0; i < UNIT / 4; ++i)
            unit[u] = fmaxf(unit[u], z[s / 2][(u * UNIT / 8 + i / 2) * 4 + 2 * (s % 2) + i % 2]);
        }
        const float top = fmaxf(fmaxf(state.max[s], unit[0]), fmaxf(unit[1], unit[2]));
        const float base = finite_base2(top), to_base = rescale(state.max[s], base);
        float sum = state.sum[s] * to_base, weighted = 0.0f;
        if constexpr (OUTPUTS) {
          weighted = (state.weighted[s] + exponent_change(state.max[s], base) * state.sum[s]) * to_base;
          const float largest = fmaxf(unit[0], fmaxf(unit[1], unit[2]));
          if (largest >= state.max[s]) {
            uint32_t column = 0;
#pragma unroll
            for (int i = TILE_N / 4 - 1; i >= 0; --i)
              if (z[s / 2][i / 2 * 4 + 2 * (s % 2) + i % 2] == largest) column = i / 2 * 8 + i % 2;
            column += first_class + lane_column;
            state.best[s] = largest > state.max[s] ? column : min(state.best[s], column);
          }
        }
#pragma unroll
        for (int u = 0; u < TILE_N / UNIT; ++u) {
          float even = 0.0f, odd = 0.0f;
#pragma unroll
          for (int i = 0; i < UNIT / 8; ++i) {
            const float* pair = &z[s / 2][(u * UNIT / 8 + i) * 4 + 2 * (s % 2)];
            const float first = term(pair[0], base), second = term(pair[1], base);
            even += first, odd += second;
            if constexpr (OUTPUTS) {
              weighted = fmaf(first, exponent(pair[0], base), weighted);
              weighted = fmaf(second, exponent(pair[1], base), weighted);
            }
          }
          mass[u] = even + odd;
          sum += mass[u];
        }
        state.max[s] = top, state.sum[s] = sum, state.weighted[s] = weighted;
        if (weigh) {
          const float inverse_cap = 1.0f / p.softcap;
#pragma unroll
          for (int u = 0; u < TILE_N / UNIT; ++u) {
            mass[u] = 0.0f;
#pragma unroll
            for (int i = 0; i < UNIT / 4; ++i) {
              const float logit = z[s / 2][(u * UNIT / 8 + i / 2) * 4 + 2 * (s % 2) + i % 2], part = logit * inverse_cap;
              mass[u] = fmaf(term(logit, base), fmaxf(fmaf(-part, part, 1.0f), 0.0f), mass[u]);
            }
          }
        }
        if constexpr (STATISTICS) {
          const float first = even_tile ? fmaxf(unit[0], unit[1]) : fmaxf(state.carry[s], unit[0]);
          const float second = even_tile ? unit[2] : fmaxf(unit[1], unit[2]);
          const float first_sum = even_tile ? mass[0] + mass[1] : fmaf(state.carry_sum[s], to_base, mass[0]);
          const float second_sum = even_tile ? mass[2] : mass[1] + mass[2];
          state.carry[s] = second, state.carry_sum[s] = second_sum;
          const uint32_t of_first = pack_statistics(first, first_sum, base);
          const uint32_t of_second = pack_statistics(second, second_sum, base);
          if (thread % 4 == s) ready = of_first, next = of_second;
        }
      }
      const uint32_t write_row = row_of(first_row, thread % 4);
      if (STATISTICS && write_row < items.rows) {
        const uint32_t block = first_class / KEEP;
        uint32_t* to = p.statistics + static_cast<size_t>(block) * p.rows + write_row;
        *to = ready;
        // An odd tile ends a second block; after the last tile there is no other half to wait for.
        if ((!even_tile || tile + 1 == items.tiles) && (block + 1) * KEEP < p.vocab) to[p.rows] = next;
      }
    }

    if (steps == 0) continue;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float max = state.max[s], sum = state.sum[s], weighted = state.weighted[s];
      uint32_t best = state.best[s];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other_max = __shfl_xor_sync(~0u, max, lanes), other_sum = __shfl_xor_sync(~0u, sum, lanes);
        const float top = fmaxf(max, other_max), base = finite_base2(top);
        if constexpr (OUTPUTS) {
          const float other_weighted = __shfl_xor_sync(~0u, weighted, lanes);
          const uint32_t other_best = __shfl_xor_sync(~0u, best, lanes);
          weighted = (weighted + exponent_change(max, base) * sum) * rescale(max, base);
          weighted += (other_weighted + exponent_change(other_max, base) * other_sum) * rescale(other_max, base);
          best = max == other_max ? min(best, other_best) : max > other_max ? best : other_best;
        }
        sum = sum * rescale(max, base) + other_sum * rescale(other_max, base);
        max = top;
      }
      // Relative to exp(max) itself, not to the rounded power of two.
      if (max != -INFINITY) {
        const float less = fmaf(max, LOG2E, -base2(max)), factor = exp2_fast(-less);
        weighted = (weighted - less * sum) * factor, sum *= factor;
      }
      if (thread % 4 == 0 && row_of(first_row, s) < items.rows) {
        const size_t to = static_cast<size_t>(items.split(group)) * p.rows + row_of(first_row, s);
        p.partials[to] = make_float2(max, sum);
        if constexpr (OUTPUTS) p.extra[to] = make_float2(weighted / LOG2E, __uint_as_float(best));
      }
    }
  }
}

template <typename T, bool STATISTICS, bool OUTPUTS>
__device__ __forceinline__ void forward(const TensorMap* embeddings, const JoinedMaps& classifier,
                                        const ForwardParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<ForwardPlan*>(shared);
  if (threadIdx.x == 0) {
    prefetch_map(embeddings);
    prefetch_map(classifier.own);
    plan.ring.init();
  }
  plan.ring.sync();
  if (threadIdx.x < GROUP) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(plan, embeddings, classifier, p);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    consume<T, STATISTICS, OUTPUTS>(plan, uniform(threadIdx.x / GROUP - 1), p);
  }
  __syncwarp();
  plan.ring.sync();
}

#define FORWARD(NAME, T, STATISTICS, OUTPUTS)                                                             \
  extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)                 \
      NAME(const __grid_constant__ TensorMap embeddings, const __grid_constant__ TensorMap classifier,    \
           const __grid_constant__ TensorMap adapter, const __grid_constant__ ForwardParams params) {     \
    forward<T, STATISTICS, OUTPUTS>(&embeddings, {&classifier, &adapter, params.adapter_column}, params); \
  }

static_assert(sizeof(ForwardPlan) == 207872, "the host asks for as much shared memory");
