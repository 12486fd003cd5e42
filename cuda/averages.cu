// What stands in the place of tiles that the filter does not keep. In such a tile t (128 rows by 128 classes), row i has M_it w_j in the place of its
// softmax p_ij, where
//
//   M_it  the row's probability in the tile without its target's (times the softcap's derivative, where there is one)
//   e_t = sum_i M_it E_i / sum_i M_it                the mean row that sees the tile
//   w_j = softmax over the tile's classes of C_j . e_t + b_j, capped
//
// so dE_i has sum_t M_it C_t more, with C_t = sum_j w_j C_j, and dC_j has w_j sum_i s_i M_it E_i more: two products
// 128 times smaller than those of all classes. The targets' entries are computed apart.
#include "common.cuh"

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
  float scale;             // of all of them
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
  p.sums[tile] = p.scale * sum;
}

struct ShareParams {
  const void *classifier, *bias;
  const void *row_sums;    // (class tiles, hidden) sum_i M_it E_i, times a scale, for f16 has no range for sums
  const float *mass_sums;  // (class tiles) sum_i M_it, times the same
  float *shares;           // out: (vocab) w, divided by the scale; 0 in a tile that no row averages
  void *mean_classes;      // out: (class tiles, hidden) C_t
  int64_t hidden, vocab;
  float softcap, logit_scale;
  uint32_t aligned;        // rows of both matrices begin on 16 bytes
  float scale;
};

constexpr int SHARE_THREADS = 512;

// The numbers of T in 16 bytes, and their dot product and sum as f32.
template <typename T> struct Chunk {
  static constexpr int WIDTH = 16 / sizeof(T);
  uint4 bytes;
  __device__ __forceinline__ Chunk(const T *from) : bytes(*reinterpret_cast<const uint4 *>(from)) {}
  __device__ __forceinline__ float at(int i) const { return to_float(reinterpret_cast<const T *>(&bytes)[i]); }
};

// The logit of a class at the tile's mean row.
template <typename T> __device__ __forceinline__ float mean_logit(const ShareParams &p, float dot, float mass, int64_t at) {
  // A row of NaN is in the sums of every tile; rows of negative upstream gradients have no mean.
  const float at_mean = mass > 0.f ? dot / mass : 0.f;
  const float bias = p.bias ? to_float(((const T *)p.bias)[at]) : 0.f;
  const float z = p.logit_scale * ((fabsf(at_mean) < INFINITY ? at_mean : 0.f) + bias);
  return p.softcap > 0.f ? p.softcap * fast_tanh(z / p.softcap) : z;
}

constexpr int AT_ONCE = 8;  // classes

// The sums of 8 numbers a thread over the block, known to every thread; `parts` [AT_ONCE][32] are used in turn.
__device__ __forceinline__ void block_sums(float (&x)[AT_ONCE], float (*parts)[32]) {
  const uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
  // Halves are swapped until a lane has what four lanes have of one of the numbers.
#pragma unroll
  for (int width = AT_ONCE / 2, mask = 16; width; width /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int k = 0; k < width; k++) {
      const float give = upper ? x[k] : x[k + width], keep = upper ? x[k + width] : x[k];
      x[k] = keep + __shfl_xor_sync(0xffffffff, give, mask);
    }
  }
  x[0] += __shfl_xor_sync(0xffffffff, x[0], 2);
  x[0] += __shfl_xor_sync(0xffffffff, x[0], 1);
  if (lane % 4 == 0) parts[lane / 4][threadIdx.x / 32] = x[0];
  __syncthreads();
  float sum = 0.f;
  for (uint32_t i = lane % 4; i < warps; i += 4) sum += parts[lane / 4][i];
  sum += __shfl_xor_sync(0xffffffff, sum, 2);
  sum += __shfl_xor_sync(0xffffffff, sum, 1);
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) x[k] = __shfl_sync(0xffffffff, sum, 4 * k);
}

// One pass over the tile's classes, 8 at a time: a thread has CHUNKS chunks of the columns, and the softmax is that of the
// classes so far.
template <typename T, int CHUNKS>
__device__ __forceinline__ void share_in_one_pass(const ShareParams &p, const T *c, const T *e, T *mean, int classes, float mass,
                                                  float *logits) {
  constexpr int WIDTH = Chunk<T>::WIDTH;
  __shared__ float parts[2][AT_ONCE][32];
  const int64_t first = (int64_t)blockIdx.x * TILE;
  float sums[CHUNKS][WIDTH] = {}, largest = -INFINITY, sum = 0.f;
  const auto column = [](int chunk) { return (int64_t)(threadIdx.x + chunk * blockDim.x) * WIDTH; };
  for (int j0 = 0; j0 < classes; j0 += AT_ONCE) {
    uint4 row[AT_ONCE][CHUNKS];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) {
        row[k][i] = make_uint4(0, 0, 0, 0);
        if (j0 + k < classes && column(i) < p.hidden) row[k][i] = *(const uint4 *)(c + (j0 + k) * p.hidden + column(i));
      }
    }
    float z[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      if (column(i) >= p.hidden) continue;
      const Chunk<T> of_mean(e + column(i));
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
        for (int x = 0; x < WIDTH; x++) z[k] += to_float(((const T *)&row[k][i])[x]) * of_mean.at(x);
      }
    }
    block_sums(z, parts[j0 / AT_ONCE % 2]);
    float now = largest;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      z[k] = j0 + k < classes ? mean_logit<T>(p, z[k], mass, first + j0 + k) : -INFINITY;
      if (threadIdx.x == k) logits[j0 + k] = z[k];
      now = fmaxf(now, z[k]);
    }
    // Classes that a bias of -infinity leaves out have no largest.
    const float base = now == -INFINITY ? 0.f : now, factor = expf(largest - base);
    largest = now, sum *= factor;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) sum += z[k] = expf(z[k] - base);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
      for (int x = 0; x < WIDTH; x++) {
        float next = factor * sums[i][x];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) next += z[k] * to_float(((const T *)&row[k][i])[x]);
        sums[i][x] = next;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    if (column(i) >= p.hidden) continue;
    uint4 chunk;
#pragma unroll
    for (int x = 0; x < WIDTH; x++) ((T *)&chunk)[x] = from_float<T>(sums[i][x] / sum);
    *(uint4 *)(mean + column(i)) = chunk;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < classes; j += blockDim.x) p.shares[first + j] = expf(logits[j] - largest) / (sum * p.scale);
}

// Of any size and alignment, with two passes over the tile's classes.
template <typename T>
__device__ __forceinline__ void share_in_two_passes(const ShareParams &p, const T *c, const T *e, T *mean, int classes,
                                                    float mass, float *shares) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (int64_t)blockIdx.x * TILE;
  for (int j = warp; j < classes; j += blockDim.x / 32) {
    float dot = 0.f;
    for (int64_t i = lane; i < p.hidden; i += 32) dot += to_float(c[j * p.hidden + i]) * to_float(e[i]);
    for (int i = 16; i; i >>= 1) dot += __shfl_xor_sync(0xffffffff, dot, i);
    if (lane == 0) shares[j] = mean_logit<T>(p, dot, mass, first + j);
  }
  __syncthreads();
  if (warp == 0) {
    float largest = -INFINITY, sum = 0.f;
    for (int j = lane; j < classes; j += 32) largest = fmaxf(largest, shares[j]);
    for (int i = 16; i; i >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, i));
    for (int j = lane; j < classes; j += 32) sum += expf(shares[j] - largest);
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
    for (int j = lane; j < classes; j += 32) {
      const float share = expf(shares[j] - largest) / sum;
      shares[j] = share;
      p.shares[first + j] = share / p.scale;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float sum = 0.f;
#pragma unroll 8
    for (int j = 0; j < classes; j++) sum += shares[j] * to_float(c[j * p.hidden + i]);
    mean[i] = from_float<T>(sum);
  }
}

// One block a tile of classes.
template <typename T> __device__ void share_masses(const ShareParams &p) {
  __shared__ float of_classes[TILE];
  const int64_t first = (int64_t)blockIdx.x * TILE;
  const int classes = (int)min((int64_t)TILE, p.vocab - first);
  const T *c = (const T *)p.classifier + first * p.hidden, *e = (const T *)p.row_sums + blockIdx.x * p.hidden;
  T *mean = (T *)p.mean_classes + blockIdx.x * p.hidden;
  const float mass = p.mass_sums[blockIdx.x];
  if (mass == 0.f) {
    for (int j = threadIdx.x; j < classes; j += blockDim.x) p.shares[first + j] = 0.f;
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) mean[i] = from_float<T>(0.f);
    return;
  }
  const int64_t a_chunk = (int64_t)blockDim.x * Chunk<T>::WIDTH;
  if (p.aligned && p.hidden <= a_chunk)
    share_in_one_pass<T, 1>(p, c, e, mean, classes, mass, of_classes);
  else if (p.aligned && p.hidden <= 2 * a_chunk)
    share_in_one_pass<T, 2>(p, c, e, mean, classes, mass, of_classes);
  else
    share_in_two_passes<T>(p, c, e, mean, classes, mass, of_classes);
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

// What a class gets as the target of rows whose entries lie in no kept tile: y (a float's bits) times a row, of which x is
// 1 + the index. One such row: of E, and y is its entry. Several, by the highest bit of x: of `combined`, which has the
// mean of these rows of E times their entries, and y is how many they are. 0: nothing.
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
  void *combined;                 // out: (rows / 2, hidden) means, for f16 has no range for sums
  uint32_t *slots;                // (vocab) zero; out: 1 + the place of a class's first row; or null: no bias
  float *target_bias;             // out: (rows) at a class's first row, the sum of its entries
  int64_t hidden;                 // columns of combined, zeros from embedding_columns on
  int64_t embedding_columns;
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
    if (found > 1) p.list[target] = make_uint2((first / 2 + 1) | COMBINED, __float_as_uint((float)found));
    if (p.slots) p.slots[target] = first + 1, p.target_bias[first] = sum;
  }
  if (found < 2 || !p.combined) return;
  for (int64_t column = threadIdx.x; column < p.hidden; column += LIST_THREADS) {
    float of_rows = 0.f;
#pragma unroll 4
    for (uint32_t at = first; at < end; at++) {
      const uint32_t row = p.sorted_row[at];
      if (column < p.embedding_columns)
        of_rows += p.entry[row] * to_float(((const T *)p.embeddings)[p.row_embedding[row] * p.embedding_columns + column]);
    }
    ((T *)p.combined)[first / 2 * p.hidden + column] = from_float<T>(of_rows / (float)found);
  }
}

#define PER_DTYPE(SUFFIX, T)                                                                                     \
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
