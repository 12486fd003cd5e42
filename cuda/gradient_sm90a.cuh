// Gradient tiles of the loss on Hopper, in kernels that share all but their last step.
//
// `gradient`: the logits of a range of classes once more, and from each tile
// G = scale exp(z - lse) - scale [target], times the softcap's slope, rounded once, into a workspace that the two
// products of the backward read. Only tiles the filter kept are computed; every block lists its share of them
// from the keep table at its start, so that the host never needs to know how many there are.
//
// `entropy_gradient`: the same with a factor of p log p besides, of a loss that has the entropy in it.
//
// `logits`: the logits themselves, in f32, and their largest and sum of exponentials in each tile; for what needs two heads'.
//
// `probabilities`: the same before lse is known, for gradients formed in the forward. It writes exp(z - reference),
// times the slope, where the reference of a row is a logit of its own; the factor exp(reference - lse) of a row is
// left to what reads G, and the target's entry, here 0, to what follows. The sums and maxima from which lse and the
// filter follow are written on the way.
#pragma once
#include "logits_sm90a.cuh"

using namespace hopper;

constexpr int KEEP = 128;            // rows and classes of a tile of the keep table ...
constexpr int TILE_N = KEEP;         // ... and of the tile a consumer group works on
constexpr int STAGES = 6;
constexpr int BLOCKS = 2;            // of a cluster: different rows, the same classes
constexpr int SHARE = 2048;          // of a block's list at most: row tiles x class tiles <= SHARE x blocks
constexpr uint32_t IDLE = 1u << 31;  // in a list: computed to keep the other block company, not written
static_assert(TILE_M == KEEP, "a consumer group works on the rows of one kept tile");

// What a kernel makes of its tiles.
enum class Tile { Gradient, EntropyGradient, Probabilities, ProbabilitiesAndOutputs, Logits };

// Everything but the two matrices; mirrored on the host. The boxes of both maps are 64 high.
struct GradientParams {
  const uint32_t* count;        // [1] compacted rows
  const int32_t* row_target;    // [rows] class, or negative: none
  const void* bias;             // [vocab] T, or null
  const float* row_max;         // [rows] lse = row_max + row_log_sum; of probabilities: the reference
  const float* row_log_sum;     // [rows]
  const float* p_scale;         // [rows] factor of the softmax, or null: 1
  const float* target_scale;    // [rows] factor of the one-hot, or null: 1
  const float* log_scale;       // [rows] factor of the softmax times its logarithm; of entropy_gradient
  const uint8_t* keep;          // [row tiles][class_tiles] 0: skip the tile; null: compute all
  void* gradient;               // [rows][gradient_stride] T, of logits f32; column 0 is first_class
  float* sums;                  // of probabilities, out: [class tiles][rows] sum of exp(z - reference), targets left out;
                                // of logits, out: [rows][class_tiles][2] the largest and the sum of exp(z - largest)
  float* maxima;                // of probabilities, out: [class tiles][rows] the largest of them, or null
  float* masses;                // of probabilities, out: [class tiles][rows] sum of them times the slope, or null
  float* outputs;               // of probabilities and outputs, out: [3][class tiles][rows] the sum of them by log2 of
                                // each, the largest logit, and its lowest class as bits; targets left out
  float* target_logit;          // of probabilities, out: [rows] where the target is a class
  uint32_t first_row;           // compacted row that row 0 of all these is
  uint32_t rows;                // at most
  uint32_t vocab;             // all classes
  uint32_t hidden;
  uint32_t adapter_column;      // from which on columns of the classifier are its adapter's, a multiple of 64; or beyond all
  uint32_t first_class;         // of the range, a multiple of 128
  uint32_t range;               // classes of the range
  uint32_t gradient_stride;     // a multiple of 128, at least the range
  uint32_t class_tiles;         // ceil(vocab / 128)
  uint32_t raster;              // row tiles of 128 that walk the classes together: even, at most 32
  float softcap;                // <= 0: none
  float logit_scale;
};

struct GradientPlan {
  Ring<TILE_M, TILE_N, STAGES, Share::B> ring;
  alignas(16) float bias[CONSUMERS][TILE_N];
  uint32_t warp_pairs[THREADS / WARP];
  uint32_t listed;
  uint32_t share[SHARE];
};

// Tiles in the order they are worked on: bands of `raster` row tiles go through the classes together, so that
// what runs at the same time shares rows and classes in L2. A "cell" is what a band and a column of tiles share.
struct GradientTiles {
  uint32_t rows, row_tiles, class_tiles, raster, cells;

  __device__ explicit GradientTiles(const GradientParams& p) : raster(min(p.raster, 32u)) {
    const uint32_t all = *p.count;
    rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
    row_tiles = (rows + TILE_M - 1) / TILE_M;
    class_tiles = (p.range + KEEP - 1) / KEEP;
    cells = (row_tiles + raster - 1) / raster * class_tiles;
  }
  // The kept row tiles of a cell, as bits.
  __device__ uint32_t kept(const GradientParams& p, uint32_t cell) const {
    const uint32_t first = cell / class_tiles * raster, height = min(raster, row_tiles - first);
    const uint8_t* keep =
        p.keep + static_cast<size_t>(first) * p.class_tiles + p.first_class / KEEP + cell % class_tiles;
    uint32_t bits = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < height; ++i) bits |= uint32_t(keep[static_cast<size_t>(i) * p.class_tiles] != 0) << i;
    return bits;
  }
};

// The list of this block: the kept tiles of each cell are paired up, one for each block of a cluster, and every
// n-th pair goes to this cluster, n the number of clusters; so all get the same number. Each thread looks through
// a run of cells, once to count the pairs and once to number them.
__device__ void list_share(GradientPlan& plan, const GradientTiles& tiles, const GradientParams& p) {
  const uint32_t run = (tiles.cells + THREADS - 1) / THREADS;
  const uint32_t begin = min(threadIdx.x * run, tiles.cells), end = min(begin + run, tiles.cells);
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rank_in_cluster = cluster_rank();
  const uint32_t cluster = blockIdx.x / BLOCKS, clusters = gridDim.x / BLOCKS;
  uint32_t pairs = 0;
  for (uint32_t cell = begin; cell < end; ++cell) pairs += (__popc(tiles.kept(p, cell)) + 1) / 2;
  uint32_t up_to = pairs;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    uint32_t other = __shfl_up_sync(~0u, up_to, d);
    if (lane >= d) up_to += other;
  }
  if (lane == WARP - 1) plan.warp_pairs[warp] = up_to;
  __syncthreads();
  uint32_t number = up_to - pairs, all = 0;  // of this thread's first pair, and how many there are
  for (uint32_t w = 0; w < THREADS / WARP; ++w) {
    if (w < warp) number += plan.warp_pairs[w];
    all += plan.warp_pairs[w];
  }
  if (all > SHARE * clusters) __trap();  // the host promised not to
  for (uint32_t cell = begin; cell < end; ++cell) {
    const uint32_t first = cell / tiles.class_tiles * tiles.raster, class_tile = cell % tiles.class_tiles;
    for (uint32_t bits = tiles.kept(p, cell); bits; ++number) {
      uint32_t row_tile = first + __ffs(bits) - 1, idle = 0;
      bits &= bits - 1;
      if (rank_in_cluster == 1) {
        if (bits)
          row_tile = first + __ffs(bits) - 1;
        else
          idle = IDLE;
      }
      bits &= bits - 1;
      if (number % clusters == cluster)
        plan.share[number / clusters] = idle | row_tile << 16 | class_tile;
    }
  }
  if (threadIdx.x == 0) plan.listed = all > cluster ? (all - cluster + clusters - 1) / clusters : 0;
}

// The n-th tile of this block.
struct GradientShare {
  const GradientPlan& plan;
  GradientTiles tiles;
  uint32_t count;
  bool listed;

  __device__ GradientShare(const GradientPlan& plan, const GradientParams& p) : plan(plan), tiles(p) {
    listed = p.keep != nullptr;
    const uint32_t all = (tiles.row_tiles + BLOCKS - 1) / BLOCKS * tiles.class_tiles, first = blockIdx.x / BLOCKS;
    const uint32_t clusters = gridDim.x / BLOCKS;
    count = listed ? plan.listed : all > first ? (all - first + clusters - 1) / clusters : 0;
  }
  // False: nothing to write.
  __device__ bool decode(uint32_t n, uint32_t& row_tile, uint32_t& class_tile) const {
    if (listed) {
      const uint32_t entry = plan.share[n];
      row_tile = entry >> 16 & 0x7FFF, class_tile = entry & 0xFFFF;
      return !(entry & IDLE);
    }
    const uint32_t index = blockIdx.x / BLOCKS + n * (gridDim.x / BLOCKS);
    const uint32_t panels = (tiles.row_tiles + BLOCKS - 1) / BLOCKS, raster = max(tiles.raster / BLOCKS, 1);
    const uint32_t band = index / (raster * tiles.class_tiles), inside = index - band * raster * tiles.class_tiles;
    const uint32_t height = min(raster, panels - band * raster);
    row_tile = (band * raster + inside % height) * BLOCKS + cluster_rank();
    class_tile = inside / height;
    return row_tile < tiles.row_tiles;
  }
};

__device__ void produce(GradientPlan& plan, const TensorMap* embeddings, const JoinedMaps& classifier,
                        const GradientParams& p) {
  GradientShare share(plan, p);
  Filler ring(plan.ring);
  for (uint32_t n = 0; n < share.count; ++n) {
    uint32_t row_tile, class_tile;
    share.decode(n, row_tile, class_tile);
    for (uint32_t k = 0; k < p.hidden; k += BLOCK_K)
      copy_block<false, false, TILE_N>(ring, embeddings, row_tile * TILE_M, k, classifier,
                               p.first_class + class_tile * KEEP, k);
  }
}

// From logits to gradients to memory. A thread's four lanes cover 8 columns of a row. ENTROPY: the loss has one.
template <typename T, bool ENTROPY>
__device__ __forceinline__ void write_gradient(float (&z)[2][TILE_N / 2], const GradientParams& p, uint32_t rows,
                                               uint32_t first_row, uint32_t first_column) {
  const int lane_column = threadIdx.x % 4 * 2;
  const uint32_t first_class = p.first_class + first_column;
  const bool capped = p.softcap > 0.0f;
  const float inverse_cap = capped ? 1.0f / p.softcap : 0.0f;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_row + s / 2 * 64 + s % 2 * 8;
    const bool counts = row < rows;
    float max = 0.0f, log2_sum = 0.0f, p_scale = 0.0f, target_scale = 0.0f, log2_scale = 0.0f;
    int target = -1;
    if (counts) {
      max = p.row_max[row], log2_sum = p.row_log_sum[row] * LOG2E;
      p_scale = p.p_scale ? p.p_scale[row] : 1.0f, target_scale = p.target_scale ? p.target_scale[row] : 1.0f;
      target = p.row_target[row] - static_cast<int>(first_class) - lane_column;
      if constexpr (ENTROPY) log2_scale = p.log_scale[row] / LOG2E;
    }
    T* to = static_cast<T*>(p.gradient) + static_cast<size_t>(row) * p.gradient_stride + first_column;
#pragma unroll
    for (int first = 0; first < TILE_N / 8; first += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float g[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * (first + i) + e;  // from the lane's first
          const float logit = z[s / 2][4 * (first + i) + 2 * (s % 2) + e];
          const float log2_p = fmaf(logit - max, LOG2E, -log2_sum);
          float factor = p_scale;
          if constexpr (ENTROPY) factor = fmaf(log2_scale, fmaxf(log2_p, LEAST_LOG2), factor);
          g[e] = factor * exp2_fast(log2_p);
          if (target == column) g[e] -= target_scale;
          if (capped) {
            const float part = logit * inverse_cap;
            g[e] *= fmaf(-part, part, 1.0f);
          }
          if (!counts || first_class + column + lane_column >= p.vocab) g[e] = 0.0f;
        }
        word[i] = pack<T>(g[0], g[1]);
      }
      const uint4 chunk = collect_chunk(word[0], word[1], word[2], word[3]);
      if (row < p.rows) *reinterpret_cast<uint4*>(to + 8 * (first + threadIdx.x % 4)) = chunk;
    }
  }
}

// From logits to what is known of the gradients before lse is. OUTPUTS: and to what entropy and the likeliest class need.
template <typename T, bool OUTPUTS>
__device__ __forceinline__ void write_probabilities(float (&z)[2][TILE_N / 2], const GradientParams& p, uint32_t rows,
                                                    uint32_t first_row, uint32_t class_tile) {
  const int lane_column = threadIdx.x % 4 * 2;
  const uint32_t first_column = class_tile * KEEP, first_class = p.first_class + first_column;
  const bool capped = p.softcap > 0.0f;
  const float inverse_cap = capped ? 1.0f / p.softcap : 0.0f;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_row + s / 2 * 64 + s % 2 * 8;
    const bool counts = row < rows;
    float base = 0.0f, even = 0.0f, odd = 0.0f, largest = 0.0f, mass = 0.0f;
    float weighted = 0.0f, best_logit = -INFINITY;
    uint32_t best = 0;
    int target = -1;
    if (counts) {
      base = p.row_max[row];
      target = p.row_target[row] - static_cast<int>(first_class) - lane_column;
    }
    T* to = static_cast<T*>(p.gradient) + static_cast<size_t>(row) * p.gradient_stride + first_column;
#pragma unroll
    for (int first = 0; first < TILE_N / 8; first += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float g[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * (first + i) + e;  // from the lane's first
          const float logit = z[s / 2][4 * (first + i) + 2 * (s % 2) + e];
          const float log2_g = (logit - base) * LOG2E;
          g[e] = exp2_fast(log2_g);
          if (!counts || first_class + column + lane_column >= p.vocab) g[e] = 0.0f;
          if (target == column) p.target_logit[row] = logit, g[e] = 0.0f;
          if constexpr (OUTPUTS) {
            weighted = fmaf(g[e], fmaxf(log2_g, LEAST_LOG2), weighted);
            const bool others = first_class + column + lane_column < p.vocab && target != column;
            if (others && logit > best_logit) best_logit = logit, best = first_class + column + lane_column;
          }
          (e == 0 ? even : odd) += g[e];
          largest = fmaxf(largest, g[e]);
          if (capped) {
            const float part = logit * inverse_cap;
            g[e] *= fmaf(-part, part, 1.0f);
            mass += g[e];
          }
        }
        word[i] = pack<T>(g[0], g[1]);
      }
      const uint4 chunk = collect_chunk(word[0], word[1], word[2], word[3]);
      if (row < p.rows) *reinterpret_cast<uint4*>(to + 8 * (first + threadIdx.x % 4)) = chunk;
    }
    float sum = even + odd;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const size_t at = static_cast<size_t>(class_tile) * p.rows + row;
    if (threadIdx.x % 4 == 0 && counts) {
      p.sums[at] = sum;
      if (p.maxima) p.maxima[at] = largest;
    }
    if constexpr (OUTPUTS) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        weighted += __shfl_xor_sync(~0u, weighted, lanes);
        const float other_logit = __shfl_xor_sync(~0u, best_logit, lanes);
        const uint32_t other = __shfl_xor_sync(~0u, best, lanes);
        if (other_logit > best_logit || (other_logit == best_logit && other < best)) best_logit = other_logit, best = other;
      }
      const size_t plane = static_cast<size_t>(p.class_tiles) * p.rows;
      if (threadIdx.x % 4 == 0 && counts)
        p.outputs[at] = weighted, p.outputs[plane + at] = best_logit, p.outputs[2 * plane + at] = __uint_as_float(best);
    }
    if (p.masses) {
      mass += __shfl_xor_sync(~0u, mass, 1);
      mass += __shfl_xor_sync(~0u, mass, 2);
      if (threadIdx.x % 4 == 0 && counts) p.masses[at] = mass;
    }
  }
}

// Below every logit that matters, and finite: a tile of -inf alone has no NaN.
constexpr float LOWEST = -1e30f;

// Logits to memory as they are, and what lse follows from. Past the last class of a tile they are -inf.
__device__ __forceinline__ void write_logits(float (&z)[2][TILE_N / 2], const GradientParams& p, uint32_t rows,
                                             uint32_t first_row, uint32_t class_tile) {
  const uint32_t first_column = class_tile * KEEP;
  mask_logits<TILE_N>(z, p.first_class + first_column, p.vocab);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_row + s / 2 * 64 + s % 2 * 8;
    float* to = static_cast<float*>(p.gradient) + static_cast<size_t>(row) * p.gradient_stride + first_column +
                threadIdx.x % 4 * 2;
    float largest = LOWEST, even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 0; i < TILE_N / 8; ++i) {
      const int j = 4 * i + 2 * (s % 2);
      largest = fmaxf(largest, fmaxf(z[s / 2][j], z[s / 2][j + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
#pragma unroll
    for (int i = 0; i < TILE_N / 8; ++i) {
      const int j = 4 * i + 2 * (s % 2);
      even += exp2_fast((z[s / 2][j] - largest) * LOG2E);
      odd += exp2_fast((z[s / 2][j + 1] - largest) * LOG2E);
      if (row < rows) *reinterpret_cast<float2*>(to + 8 * i) = make_float2(z[s / 2][j], z[s / 2][j + 1]);
    }
    float sum = even + odd;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (threadIdx.x % 4 == 0 && row < rows)
      reinterpret_cast<float2*>(p.sums)[static_cast<size_t>(row) * p.class_tiles + class_tile] = make_float2(largest, sum);
  }
}

template <typename T, Tile TILE_OF>
__device__ void consume(GradientPlan& plan, int group, const GradientParams& p) {
  GradientShare share(plan, p);
  Drainer ring(plan.ring);
  const uint32_t blocks = (p.hidden + BLOCK_K - 1) / BLOCK_K;
  const uint32_t thread = threadIdx.x % GROUP;
  const uint32_t thread_row = thread / WARP * 16 + thread % WARP / 4;
  const T* bias = static_cast<const T*>(p.bias);
  if (group == 1) ring.at.skip(blocks);

  for (uint32_t n = group; n < share.count; n += CONSUMERS) {
    uint32_t row_tile, class_tile;
    const bool write = share.decode(n, row_tile, class_tile);
    const uint32_t first_class = p.first_class + class_tile * KEEP;
    if (bias) stage_bias(plan.bias[group], bias, group, first_class, p.vocab);

    float z[2][TILE_N / 2];
    if (n > 0) take_turn(group);
    multiply<T, false, false, TILE_N>(z, ring, blocks, [&] {
      if (n + 1 < share.count) give_turn(1 - group);
    });
    ring.at.skip(blocks);  // the other group's

    if (!write) continue;
    finish_logits(z, bias ? plan.bias[group] : nullptr, p.logit_scale, p.softcap);
    const uint32_t row = row_tile * TILE_M + thread_row;
    constexpr bool OUTPUTS = TILE_OF == Tile::ProbabilitiesAndOutputs;
    if constexpr (OUTPUTS || TILE_OF == Tile::Probabilities)
      write_probabilities<T, OUTPUTS>(z, p, share.tiles.rows, row, class_tile);
    else if constexpr (TILE_OF == Tile::Logits)
      write_logits(z, p, share.tiles.rows, row, class_tile);
    else
      write_gradient<T, TILE_OF == Tile::EntropyGradient>(z, p, share.tiles.rows, row, class_tile * KEEP);
  }
}

template <typename T, Tile TILE_OF>
__device__ __forceinline__ void gradient(const TensorMap* embeddings, const JoinedMaps& classifier,
                                         const GradientParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<GradientPlan*>(shared);
  if (threadIdx.x == 0) {
    prefetch_map(embeddings);
    prefetch_map(classifier.own);
    plan.ring.init();
  }
  if (p.keep) list_share(plan, GradientTiles(p), p);
  plan.ring.sync();
  if (threadIdx.x < GROUP) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(plan, embeddings, classifier, p);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    consume<T, TILE_OF>(plan, uniform(threadIdx.x / GROUP - 1), p);
  }
  __syncwarp();
  plan.ring.sync();
}

#define GRADIENT(NAME, T, TILE_OF)                                                                     \
  extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)              \
      NAME(const __grid_constant__ TensorMap embeddings, const __grid_constant__ TensorMap classifier, \
           const __grid_constant__ TensorMap adapter, const __grid_constant__ GradientParams params) { \
    gradient<T, TILE_OF>(&embeddings, {&classifier, &adapter, params.adapter_column}, params);         \
  }

static_assert(sizeof(GradientPlan) == 207872, "the host asks for as much shared memory");
