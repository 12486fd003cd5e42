// The gradient filter: which tiles of the gradient of the logits (128 rows by 128 classes) are computed entry by entry, and
// the mass of each row in the others, which `averages.cu` shares out.
#include "common.cuh"

constexpr int FILTER_TILES = 32;  // class tiles of a block

struct FilterParams {
  const void *statistics;    // (class tiles, group_rows) TileStatistics<T>
  const float *row_max, *row_log_sum;
  const int32_t *row_target;
  const uint32_t *count;
  uint8_t *keep;             // out: (row tiles, class_tiles)
  void *masses;              // out: (rows, mass_stride) M in T, 0 in tiles that no gradient averages; or null
  uint32_t first_row, group_rows, class_tiles;
  uint32_t mass_stride;      // a multiple of 128; columns past the last tile become 0
  // A gradient keeps a tile where a probability reaches this. Negative: every tile; above 1: it is not wanted.
  float embeddings_threshold, classifier_threshold;
  uint32_t keep_targets;     // 1: a tile that holds the target of one of its rows is kept too
};

// The bits of a tile, known to every thread of its block: a thread is a row, `largest` its largest probability there.
// NaN keeps a tile.
__device__ __forceinline__ uint8_t kept_bits(bool keep, float largest, float embeddings_threshold,
                                             float classifier_threshold) {
  const auto matters = [&](float threshold) { return threshold <= 1.f && (keep || !(largest < threshold)); };
  const int e = __syncthreads_or(matters(embeddings_threshold)), c = __syncthreads_or(matters(classifier_threshold));
  return (e ? KEEP_FOR_EMBEDDINGS : 0) | (c ? KEEP_FOR_CLASSIFIER : 0);
}

__device__ __forceinline__ uint8_t wanted_bits(float embeddings_threshold, float classifier_threshold) {
  return (embeddings_threshold <= 1.f ? KEEP_FOR_EMBEDDINGS : 0) | (classifier_threshold <= 1.f ? KEEP_FOR_CLASSIFIER : 0);
}

// A block does 128 rows by FILTER_TILES class tiles, a thread a row: `row_of(tile, mass)` is the row's largest
// probability in a tile, and sets its mass there. Masses are turned round in shared memory, to be written row by row.
template <typename T, class RowOf>
__device__ __forceinline__ void filter_block(uint8_t *keep, T *masses, uint32_t class_tiles, uint32_t mass_stride,
                                             float embeddings_threshold, float classifier_threshold, RowOf row_of) {
  __shared__ T staged[TILE][FILTER_TILES + 2];
  const uint32_t first_tile = blockIdx.x * FILTER_TILES;
  const uint8_t wanted = wanted_bits(embeddings_threshold, classifier_threshold);
  for (uint32_t i = 0; i < FILTER_TILES; i++) {
    const uint32_t tile = first_tile + i;
    float mass = 0.f;
    if (tile < class_tiles) {
      bool always = false;
      const float largest = row_of(tile, mass, always);
      const uint8_t bits = kept_bits(always, largest, embeddings_threshold, classifier_threshold);
      if (threadIdx.x == 0) keep[tile] = bits;
      if (bits == wanted) mass = 0.f;
    }
    staged[threadIdx.x][i] = from_float<T>(mass);
  }
  if (!masses) return;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < TILE * FILTER_TILES; i += TILE) {
    const uint32_t row = i / FILTER_TILES, tile = first_tile + i % FILTER_TILES;
    if (tile < mass_stride) masses[(int64_t)row * mass_stride + tile] = staged[row][i % FILTER_TILES];
  }
}

// Of the forward's statistics.
template <typename T> __device__ void filter_tiles(const FilterParams &p) {
  const uint32_t in_group = blockIdx.y * TILE + threadIdx.x, row = p.first_row + in_group;
  const uint32_t first_row = p.first_row + blockIdx.y * TILE;
  if (first_row >= *p.count) return;
  const bool exists = row < *p.count;
  const float max = exists ? p.row_max[row] : 0.f, log_sum = exists ? p.row_log_sum[row] : 0.f;
  const int target_tile = exists && p.keep_targets && p.row_target[row] >= 0 ? p.row_target[row] / TILE : -1;
  T *masses = p.masses ? (T *)p.masses + (int64_t)first_row * p.mass_stride : nullptr;
  filter_block(p.keep + (int64_t)(first_row / TILE) * p.class_tiles, masses, p.class_tiles, p.mass_stride,
               p.embeddings_threshold, p.classifier_threshold, [&](uint32_t tile, float &mass, bool &always) {
                 if (!exists) return 0.f;
                 const float2 s = ((const TileStatistics<T> *)p.statistics)[(int64_t)tile * p.group_rows + in_group].unpack();
                 const float probability = fast_exp((s.x - max) - log_sum);
                 mass = s.y * probability;
                 always = (int)tile == target_tile || !(fabsf(mass) < INFINITY);
                 // exp errs by a few units in the last place: lean to the side of keeping.
                 return (1.f + 1e-5f) * probability;
               });
}

struct ProbableParams {
  const float *maxima;     // (class tiles, chunk_rows) of probabilities before their row's factor, targets left out
  const float *sums;       // (class tiles, chunk_rows) of them, by the softcap's derivative each
  const float *row_log_sum;
  const int32_t *row_target;
  const uint32_t *count, *redo;
  uint8_t *keep;           // out: (row tiles, class tiles)
  void *masses;            // out: (chunk_rows, mass_stride), before their row's factor; or null
  uint32_t first_row, chunk_rows, class_tiles, mass_stride;
  float embeddings_threshold, classifier_threshold;  // as in FilterParams
};

// Of gradients formed in the forward.
template <typename T> __device__ void filter_probabilities(const ProbableParams &p) {
  const uint32_t in_chunk = blockIdx.y * TILE + threadIdx.x, row = p.first_row + in_chunk;
  const uint32_t first_row = p.first_row + blockIdx.y * TILE;
  if (first_row >= *p.count) return;
  const bool exists = row < *p.count;
  // A bad target makes NaN of everything it meets.
  const bool all = *p.redo || (exists && p.row_target[row] < 0);
  const float factor = exists ? expf(-p.row_log_sum[row]) : 0.f;
  T *masses = p.masses ? (T *)p.masses + (int64_t)blockIdx.y * TILE * p.mass_stride : nullptr;
  filter_block(p.keep + (int64_t)(first_row / TILE) * p.class_tiles, masses, p.class_tiles, p.mass_stride,
               p.embeddings_threshold, p.classifier_threshold, [&](uint32_t tile, float &mass, bool &always) {
                 always = all;
                 if (!exists) return 0.f;
                 const int64_t at = (int64_t)tile * p.chunk_rows + in_chunk;
                 mass = p.sums[at];
                 always |= !(fabsf(mass) < INFINITY);
                 return (1.f + 1e-5f) * p.maxima[at] * factor;
               });
}

struct CountParams {
  const uint8_t *keep;  // null: every tile
  const uint32_t *count;
  float *kept;  // out: tiles that the gradient which keeps more of them keeps, tiles there are
  uint32_t class_tiles;
};

extern "C" __global__ void __launch_bounds__(ONE_BLOCK) count_kept(const CountParams p) {
  const uint64_t tiles = (uint64_t)((*p.count + TILE - 1) / TILE) * p.class_tiles;
  unsigned long long e = 0, c = 0;
  if (p.keep) {
    for (uint64_t i = threadIdx.x; i < tiles; i += ONE_BLOCK)
      e += p.keep[i] & KEEP_FOR_EMBEDDINGS, c += p.keep[i] / KEEP_FOR_CLASSIFIER;
  }
  const auto add = [](unsigned long long a, unsigned long long b) { return a + b; };
  e = block_reduce<ONE_BLOCK>(e, add);
  c = block_reduce<ONE_BLOCK>(c, add);
  if (threadIdx.x == 0) p.kept[0] = p.keep ? (float)max(e, c) : (float)tiles, p.kept[1] = (float)tiles;
}

#define PER_DTYPE(SUFFIX, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(TILE) filter_tiles_##SUFFIX(const FilterParams p) { \
    filter_tiles<T>(p);                                                                            \
  }
PER_DTYPE(bf16, __nv_bfloat16)
PER_DTYPE(f16, __half)
PER_DTYPE(f32, float)

extern "C" __global__ void __launch_bounds__(TILE) filter_probabilities_bf16(const ProbableParams p) {
  filter_probabilities<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(TILE) filter_probabilities_f16(const ProbableParams p) {
  filter_probabilities<__half>(p);
}
