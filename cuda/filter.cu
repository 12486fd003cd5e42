// The gradient filter: which tiles of the gradient of the logits are computed entry by entry, and what stands in the
// place of the others. In a tile t (128 rows by 128 classes) that is not kept, row i has M_it w_j in the place of its
// softmax p_ij, where
//
//   M_it  the row's probability in the tile without its target's (times the softcap's derivative, where there is one)
//   e_t = sum_i M_it E_i / sum_i M_it                the mean row that sees the tile
//   w_j = softmax over the tile's classes of C_j . e_t + b_j, capped
//
// so dE_i has sum_t M_it C_t more, with C_t = sum_j w_j C_j, and dC_j has w_j sum_i s_i M_it E_i more: two products
// 128 times smaller than those of all classes. The targets' entries are computed apart.
#include "common.cuh"

constexpr int ONE_BLOCK = 1024;

// ---------------------------------------------------------------- which tiles are kept

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

// ---------------------------------------------------------------- what stands in the place of the others

struct ScaleMassesParams {
  const void *masses;    // (rows, mass_stride)
  const uint8_t *keep;   // (row tiles, class_tiles) of these rows
  const float *p_scale;  // (rows) of the softmax, or null: 1
  const uint32_t *count;
  void *scaled;          // out: (rows, mass_stride), 0 where the gradient keeps the tile
  uint32_t first_row;    // that row 0 is, a multiple of 128
  uint32_t class_tiles, mass_stride;
  uint32_t bit;          // of the gradient
};

// One block a row: the masses that one gradient averages, times the row's upstream gradient.
template <typename T> __device__ void scale_masses(const ScaleMassesParams &p) {
  const uint32_t row = blockIdx.x, count = *p.count;
  if (p.first_row + row / TILE * TILE >= count) return;
  const float scale = p.first_row + row >= count ? 0.f : p.p_scale ? p.p_scale[row] : 1.f;
  const uint8_t *keep = p.keep + (int64_t)(row / TILE) * p.class_tiles;
  const T *from = (const T *)p.masses + (int64_t)row * p.mass_stride;
  T *into = (T *)p.scaled + (int64_t)row * p.mass_stride;
  for (uint32_t tile = threadIdx.x; tile < p.mass_stride; tile += blockDim.x) {
    const bool kept = tile >= p.class_tiles || (keep[tile] & p.bit);
    into[tile] = from_float<T>(kept ? 0.f : scale * to_float(from[tile]));
  }
}

struct SumMassesParams {
  const void *masses;      // (rows, mass_stride)
  const float *row_scale;  // (rows), or null: 1
  const uint32_t *count;
  float *sums;             // out: (class_tiles)
  uint32_t first_row, rows, class_tiles, mass_stride;
};

constexpr int SUM_COLUMNS = 32, SUM_PARTS = ONE_BLOCK / SUM_COLUMNS;

// sum_i M_it: a block sums 32 tiles, in 32 interleaved parts of the rows.
template <typename T> __device__ void sum_masses(const SumMassesParams &p) {
  __shared__ float parts[SUM_PARTS][SUM_COLUMNS];
  const uint32_t x = threadIdx.x % SUM_COLUMNS, part = threadIdx.x / SUM_COLUMNS, tile = blockIdx.x * SUM_COLUMNS + x;
  const uint32_t all = *p.count, rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
  float sum = 0.f;
  if (tile < p.class_tiles) {
#pragma unroll 8
    for (uint32_t row = part; row < rows; row += SUM_PARTS) {
      const float mass = to_float(((const T *)p.masses)[(int64_t)row * p.mass_stride + tile]);
      sum += p.row_scale ? p.row_scale[row] * mass : mass;
    }
  }
  parts[part][x] = sum;
  __syncthreads();
  if (part > 0 || tile >= p.class_tiles) return;
  for (int i = 1; i < SUM_PARTS; i++) sum += parts[i][x];
  p.sums[tile] = sum;
}

struct ShareParams {
  const void *classifier, *bias;
  const void *row_sums;    // (class tiles, hidden) sum_i M_it E_i
  const float *mass_sums;  // (class tiles) sum_i M_it
  float *shares;           // out: (vocab) w, 0 in a tile that no row averages
  void *mean_classes;      // out: (class tiles, hidden) C_t
  int64_t hidden, vocab;
  float softcap;
  uint32_t aligned;        // rows of both matrices begin on 16 bytes
};

constexpr int SHARE_THREADS = 512;

// The numbers of T in 16 bytes, and their dot product and sum as f32.
template <typename T> struct Chunk {
  static constexpr int WIDTH = 16 / sizeof(T);
  uint4 bytes;
  __device__ __forceinline__ Chunk(const T *from) : bytes(*reinterpret_cast<const uint4 *>(from)) {}
  __device__ __forceinline__ float at(int i) const { return to_float(reinterpret_cast<const T *>(&bytes)[i]); }
};

// One block a tile of classes.
template <typename T> __device__ void share_masses(const ShareParams &p) {
  __shared__ float shares[TILE];
  const uint32_t tile = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (int64_t)tile * TILE;
  const int classes = (int)min((int64_t)TILE, p.vocab - first);
  const T *c = (const T *)p.classifier + first * p.hidden, *e = (const T *)p.row_sums + tile * p.hidden;
  T *mean = (T *)p.mean_classes + tile * p.hidden;
  const float mass = p.mass_sums[tile];
  if (!(mass > 0.f)) {
    for (int j = threadIdx.x; j < classes; j += SHARE_THREADS) p.shares[first + j] = 0.f;
    for (int64_t i = threadIdx.x; i < p.hidden; i += SHARE_THREADS) mean[i] = from_float<T>(0.f);
    return;
  }
  constexpr int WIDTH = Chunk<T>::WIDTH;
  for (int j = warp; j < classes; j += SHARE_THREADS / 32) {
    const T *row = c + j * p.hidden;
    float dot = 0.f;
    if (p.aligned) {
#pragma unroll 4
      for (int64_t i = lane * WIDTH; i < p.hidden; i += 32 * WIDTH) {
        const Chunk<T> a(row + i), b(e + i);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) dot += a.at(k) * b.at(k);
      }
    } else {
      for (int64_t i = lane; i < p.hidden; i += 32) dot += to_float(row[i]) * to_float(e[i]);
    }
    for (int i = 16; i; i >>= 1) dot += __shfl_xor_sync(0xffffffff, dot, i);
    if (lane == 0) {
      float z = dot / mass + (p.bias ? to_float(((const T *)p.bias)[first + j]) : 0.f);
      if (p.softcap > 0.f) z = p.softcap * fast_tanh(z / p.softcap);
      shares[j] = z;
    }
  }
  __syncthreads();
  if (warp == 0) {
    float largest = -INFINITY, sum = 0.f;
    for (int j = lane; j < classes; j += 32) largest = fmaxf(largest, shares[j]);
    for (int i = 16; i; i >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, i));
    for (int j = lane; j < classes; j += 32) sum += expf(shares[j] - largest);
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
    for (int j = lane; j < classes; j += 32) p.shares[first + j] = shares[j] = expf(shares[j] - largest) / sum;
  }
  __syncthreads();
  if (p.aligned) {
    for (int64_t i = threadIdx.x * WIDTH; i < p.hidden; i += SHARE_THREADS * WIDTH) {
      float sum[WIDTH] = {};
#pragma unroll 8
      for (int j = 0; j < classes; j++) {
        const Chunk<T> a(c + j * p.hidden + i);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) sum[k] += shares[j] * a.at(k);
      }
      for (int k = 0; k < WIDTH; k++) mean[i + k] = from_float<T>(sum[k]);
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.hidden; i += SHARE_THREADS) {
      float sum = 0.f;
#pragma unroll 8
      for (int j = 0; j < classes; j++) sum += shares[j] * to_float(c[j * p.hidden + i]);
      mean[i] = from_float<T>(sum);
    }
  }
}

// ---------------------------------------------------------------- the targets' entries

struct EntryParams {
  const float *row_max, *row_log_sum, *target_logit;
  const int32_t *row_target;
  const uint32_t *count;
  const uint8_t *keep;                          // (row tiles, class_tiles) of these rows
  const float *p_scale, *target_scale;          // of the softmax and of the one-hot
  float *embeddings_entry, *classifier_entry;   // out: what a gradient lacks, 0 where it keeps the target's tile
  uint32_t first_row, rows, class_tiles;
  float softcap;
};

// Row arrays begin at the first row of the launch. One thread a row.
extern "C" __global__ void target_entries(const EntryParams p) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const int target = p.first_row + row < *p.count ? p.row_target[row] : -1;
  float entry = 0.f;
  uint8_t kept = 0;
  if (target >= 0) {
    const float logit = p.target_logit[row], log_p = (logit - p.row_max[row]) - p.row_log_sum[row];
    const float part = p.softcap > 0.f ? logit / p.softcap : 0.f, scale = p.target_scale[row];
    // p_scale p - target_scale, with p - 1 of a confident target without cancellation.
    entry = ((p.p_scale[row] - scale) * expf(log_p) + scale * expm1f(log_p)) * (1.f - part * part);
    kept = p.keep[(int64_t)(row / TILE) * p.class_tiles + target / TILE];
  }
  p.embeddings_entry[row] = kept & KEEP_FOR_EMBEDDINGS ? 0.f : entry;
  p.classifier_entry[row] = kept & KEEP_FOR_CLASSIFIER ? 0.f : entry;
}

// What a class gets as the target of rows whose entries lie in no kept tile: y (a float's bits) times a row of E, of
// which x is 1 + the index, or, with the highest bit of x set, a row of their sums, each times its entry; 0: nothing.
using TargetRow = uint2;
constexpr uint32_t COMBINED = 1u << 31;

struct ListTargetsParams {
  const void *embeddings;
  const uint32_t *row_embedding;  // (rows)
  const uint32_t *sorted_row;     // (rows) by target
  const int32_t *sorted_target;
  const float *entry;             // (rows)
  const uint32_t *count;
  TargetRow *list;                // (vocab) zero
  void *combined;                 // out: (rows / 2, hidden)
  uint32_t *slots;                // (vocab) zero; out: 1 + the place of a class's first row; or null: no bias
  float *target_bias;             // out: (rows) at a class's first row, the sum of its entries
  int64_t hidden;
  uint32_t first_row, rows;
};

constexpr int LIST_THREADS = 256;

// A block a sorted row; that of a class's first row goes through all of them. Two rows or more have a place in `combined`
// of their own: half of that of the first.
template <typename T> __device__ void list_targets(const ListTargetsParams &p) {
  const uint32_t all = *p.count, rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0, first = blockIdx.x;
  if (first >= rows) return;
  const int target = p.sorted_target[first];
  if (target < 0 || (first > 0 && p.sorted_target[first - 1] == target)) return;
  float sum = 0.f;
  uint32_t found = 0, its_row = 0, end = first;
  float its_entry = 0.f;
  for (; end < rows && p.sorted_target[end] == target; end++) {
    const uint32_t row = p.sorted_row[end];
    const float entry = p.entry[row];
    if (entry != 0.f) found++, its_row = row, its_entry = entry;
    sum += entry;
  }
  if (threadIdx.x == 0) {
    if (found == 1) p.list[target] = make_uint2(its_row + 1, __float_as_uint(its_entry));
    if (found > 1) p.list[target] = make_uint2((first / 2 + 1) | COMBINED, __float_as_uint(1.f));
    if (p.slots) p.slots[target] = first + 1, p.target_bias[first] = sum;
  }
  if (found < 2 || !p.combined) return;
  for (int64_t column = threadIdx.x; column < p.hidden; column += LIST_THREADS) {
    float of_rows = 0.f;
#pragma unroll 4
    for (uint32_t at = first; at < end; at++) {
      const uint32_t row = p.sorted_row[at];
      of_rows += p.entry[row] * to_float(((const T *)p.embeddings)[p.row_embedding[row] * p.hidden + column]);
    }
    ((T *)p.combined)[first / 2 * p.hidden + column] = from_float<T>(of_rows);
  }
}

#define PER_DTYPE(SUFFIX, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(TILE) filter_tiles_##SUFFIX(const FilterParams p) {               \
    filter_tiles<T>(p);                                                                                          \
  }                                                                                                              \
  extern "C" __global__ void scale_masses_##SUFFIX(const ScaleMassesParams p) { scale_masses<T>(p); }            \
  extern "C" __global__ void __launch_bounds__(ONE_BLOCK) sum_masses_##SUFFIX(const SumMassesParams p) {         \
    sum_masses<T>(p);                                                                                            \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(SHARE_THREADS) share_masses_##SUFFIX(const ShareParams p) {       \
    share_masses<T>(p);                                                                                          \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(LIST_THREADS) list_targets_##SUFFIX(const ListTargetsParams p) {  \
    list_targets<T>(p);                                                                                          \
  }
PER_DTYPE(bf16, __nv_bfloat16)
PER_DTYPE(f16, __half)
PER_DTYPE(f32, float)

extern "C" __global__ void __launch_bounds__(TILE) filter_probabilities_bf16(const ProbableParams p) {
  filter_probabilities<__nv_bfloat16>(p);
}
