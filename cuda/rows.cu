// The kernels around the products, one number or one row at a time: picking the rows that count, merging the
// partial results of the forward, the gradient filter's tiles, upstream gradients, and writing dE and db.
#include "common.cuh"

constexpr int ONE_BLOCK = 1024;
constexpr uint32_t NONE = 0xffffffff;

// ---------------------------------------------------------------- rows that count

struct PickParams {
  const void *targets;      // (batch * time), i64, u32 or i32
  uint32_t *row_embedding;  // out, in the order of the positions
  uint32_t *row_position;
  int32_t *row_target;      // row of the classifier, -1 where out of range or in the shard of another rank
  uint32_t *count;          // out: rows that count, first target out of range (its index, or NONE)
  float *packed;            // loss (positions), lse (positions): zeroed where a position does not count
  int64_t ignore_index, first_class;  // vocab classes from this one on
  uint32_t positions, time, shift, vocab;
};

template <typename Target> __device__ void pick_rows(const PickParams &p) {
  __shared__ uint32_t warp_counts[ONE_BLOCK / 32];
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32, steps = p.time - p.shift;
  uint32_t total = 0, first_bad = NONE;
  for (uint32_t start = 0; start < p.positions; start += ONE_BLOCK) {
    const uint32_t position = start + threadIdx.x;
    const bool exists = position < p.positions && position >= start;
    const uint32_t row = exists ? position / steps * p.time + position % steps : 0;
    const int64_t target = exists ? (int64_t)((const Target *)p.targets)[row + p.shift] : 0;
    const bool counts = exists && target != p.ignore_index;
    const uint32_t ballot = __ballot_sync(0xffffffff, counts);
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    uint32_t before = total;
    for (uint32_t w = 0; w < ONE_BLOCK / 32; w++) {
      if (w < warp) before += warp_counts[w];
      total += warp_counts[w];
    }
    if (counts) {
      const uint32_t at = before + __popc(ballot & ((1u << lane) - 1));
      const bool in_range = target >= p.first_class && target - p.first_class < (int64_t)p.vocab;
      if (!in_range) first_bad = min(first_bad, row + p.shift);
      p.row_embedding[at] = row;
      p.row_position[at] = position;
      p.row_target[at] = in_range ? (int32_t)(target - p.first_class) : -1;
    } else if (exists) {
      p.packed[position] = 0.f;
      p.packed[(int64_t)p.positions + position] = 0.f;
    }
    __syncthreads();
    if (start + ONE_BLOCK < start) break;  // the last block of 2^32 positions
  }
  first_bad = block_reduce<ONE_BLOCK>(first_bad, [](uint32_t a, uint32_t b) { return min(a, b); });
  if (threadIdx.x == 0) p.count[0] = total, p.count[1] = first_bad;
}

#define PICK(SUFFIX, T) extern "C" __global__ void __launch_bounds__(ONE_BLOCK) pick_rows_##SUFFIX(const PickParams p) { pick_rows<T>(p); }
PICK(i64, int64_t)
PICK(u32, uint32_t)
PICK(i32, int32_t)

struct GatherParams {
  const uint4 *embeddings;  // (.., chunks): 16 bytes at a time
  const uint32_t *row_embedding;
  const uint32_t *count;
  uint4 *gathered;  // out: (rows of this launch, chunks), zeros for rows there are not
  int64_t chunks;
  uint32_t first_row;
};

// One block a row: the rows that count, one after the other, as the copy engine wants them.
extern "C" __global__ void gather_rows(const GatherParams p) {
  const uint32_t row = p.first_row + blockIdx.x;
  const bool exists = row < *p.count;
  const uint4 *from = p.embeddings + (exists ? p.row_embedding[row] * p.chunks : 0);
  uint4 *into = p.gathered + blockIdx.x * p.chunks;
  for (int64_t i = threadIdx.x; i < p.chunks; i += blockDim.x) into[i] = exists ? from[i] : make_uint4(0, 0, 0, 0);
}

// ---------------------------------------------------------------- forward

struct MergeParams {
  const float2 *partials;  // (splits, group_rows)
  const float *target_logit;
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count;
  float *row_max, *row_log_sum;  // out
  float *packed;                 // out: loss, lse
  uint32_t first_row, group_rows, splits, positions;
  float z_loss;
  uint32_t sharded;  // the target may be another rank's: `merge_shards` has the last word
};

// What z-loss adds to the loss of a row, and what it leaves of the softmax in its gradient.
__device__ __forceinline__ float z_part(float weight, float lse) { return weight == 0.f ? 0.f : weight * lse * lse; }
__device__ __forceinline__ float softmax_share(float weight, float lse) {
  return weight == 0.f ? 1.f : 1.f + 2.f * weight * lse;
}

extern "C" __global__ void merge_partials(const MergeParams p) {
  const uint32_t in_group = blockIdx.x * blockDim.x + threadIdx.x, row = p.first_row + in_group;
  if (in_group >= p.group_rows || row >= *p.count) return;
  MaxSum all;
  for (uint32_t split = 0; split < p.splits; split++) {
    const float2 part = p.partials[(int64_t)split * p.group_rows + in_group];
    all.merge(part.x, part.y);
  }
  const float log_sum = logf(all.sum);
  const uint32_t position = p.row_position[row];
  const bool in_range = p.row_target[row] >= 0;
  // lse = max + log_sum is kept in two parts: logits of 1e4 leave f32 three digits behind the point.
  const float lse = all.max + log_sum;
  p.packed[position] = in_range ? (all.max - p.target_logit[row]) + log_sum + z_part(p.z_loss, lse) : NAN;
  p.packed[(int64_t)p.positions + position] = lse;
  p.row_max[row] = in_range || p.sharded ? all.max : NAN;  // so that the gradient of a bad target is NaN too
  p.row_log_sum[row] = log_sum;
}

struct ShardParams {
  const float *max;  // (positions), over all ranks
  const float *all;  // (3, positions), over all ranks: as `here`
  float *row_max, *row_log_sum;
  const float *target_logit;
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count;
  float *here;    // out: the maxima (positions); or (3, positions): sum of exp(z - max), target's logit, whether it is here
  float *packed;  // out: loss, lse
  uint32_t positions;
  float z_loss;
};

// The maxima of a shard, for the other ranks.
extern "C" __global__ void shard_maxima(const ShardParams p) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < p.positions) p.here[row] = row < *p.count ? p.row_max[row] : 0.f;
}

// The sums of a shard relative to the maxima of all, for the other ranks.
extern "C" __global__ void shard_sums(const ShardParams p) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.positions) return;
  const bool counts = row < *p.count, here = counts && p.row_target[row] >= 0;
  const int64_t n = p.positions;
  p.here[row] = counts ? expf((p.row_max[row] - p.max[row]) + p.row_log_sum[row]) : 0.f;
  p.here[n + row] = here ? p.target_logit[row] : 0.f;
  p.here[2 * n + row] = here ? 1.f : 0.f;
}

// What `merge_partials` writes, over the classes of all ranks. A target of no rank, or of two, makes its row NaN.
extern "C" __global__ void merge_shards(const ShardParams p) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.positions || row >= *p.count) return;
  const int64_t n = p.positions;
  const float max = p.max[row], log_sum = logf(p.all[row]), lse = max + log_sum;
  const bool on_one_rank = p.all[2 * n + row] == 1.f;
  const uint32_t position = p.row_position[row];
  p.packed[position] = on_one_rank ? (max - p.all[n + row]) + log_sum + z_part(p.z_loss, lse) : NAN;
  p.packed[n + position] = lse;
  p.row_max[row] = on_one_rank ? max : NAN;
  p.row_log_sum[row] = log_sum;
}

struct LossParams {
  float *packed;  // losses (positions), lse (positions), loss (1): out
  const uint32_t *count;
  uint32_t positions, mean;
};

// The sum of the losses, or their mean.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) reduce_loss(const LossParams p) {
  double sum = 0.;
  for (uint64_t i = threadIdx.x; i < p.positions; i += ONE_BLOCK) sum += p.packed[i];
  sum = block_reduce<ONE_BLOCK>(sum, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) p.packed[2 * (int64_t)p.positions] = (float)(p.mean && *p.count ? sum / *p.count : sum);
}

// ---------------------------------------------------------------- gradients formed in the forward

// A chunk of rows: what is theirs alone begins at the chunk's first row, the rest at row 0.
struct ReferenceParams {
  const void *gathered;  // (chunk_rows, hidden)
  const void *classifier, *bias;
  const int32_t *row_target;
  const uint32_t *count;
  float *reference;  // out: (chunk_rows)
  int64_t hidden;
  uint32_t first_row;
  float softcap;
};

// The logit of a row's target: what its probabilities are measured from, for lse is never below it and seldom far
// above. 0 where that is no finite number; NaN, so that all is done again, where the target is no class. One warp a row.
template <typename T> __device__ void reference_logits(const ReferenceParams &p) {
  const uint32_t in_chunk = (blockIdx.x * blockDim.x + threadIdx.x) / 32, row = p.first_row + in_chunk;
  if (row >= *p.count) return;
  const int target = p.row_target[row];
  float sum = 0.f;
  if (target >= 0) {
    const T *e = (const T *)p.gathered + in_chunk * p.hidden, *c = (const T *)p.classifier + target * p.hidden;
    for (int64_t i = threadIdx.x % 32; i < p.hidden; i += 32) sum += to_float(e[i]) * to_float(c[i]);
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
    if (p.bias) sum += to_float(((const T *)p.bias)[target]);
    if (p.softcap > 0.f) sum = p.softcap * fast_tanh(sum / p.softcap);
  }
  if (threadIdx.x % 32 == 0) p.reference[in_chunk] = target < 0 ? NAN : fabsf(sum) < INFINITY ? sum : 0.f;
}

struct SumsParams {
  const float *reference;  // (chunk_rows)
  const float *sums;       // (class tiles, chunk_rows), targets left out
  const float *target_logit;
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count;
  float *row_max, *row_log_sum;  // out
  float *packed;                 // out: loss, lse
  uint32_t *redo;                // zero; out: the count if a sum left the range, so that all must be done again
  uint32_t first_row, chunk_rows, class_tiles, positions;
  float z_loss;
};

// exp(+-FAR) times any softmax that matters is a normal bf16 number, and f32 sums of them are finite.
constexpr float FAR = 60.f;
constexpr int SUM_ROWS = 32, SUM_PARTS = ONE_BLOCK / SUM_ROWS;

// 32 rows a block, 32 interleaved parts of the class tiles.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) merge_sums(const SumsParams p) {
  __shared__ float parts[SUM_PARTS][SUM_ROWS];
  const uint32_t x = threadIdx.x % SUM_ROWS, part = threadIdx.x / SUM_ROWS;
  const uint32_t in_chunk = blockIdx.x * SUM_ROWS + x, row = p.first_row + in_chunk;
  const bool exists = in_chunk < p.chunk_rows && row < *p.count;
  float sum = 0.f;
  if (exists)
    for (uint32_t tile = part; tile < p.class_tiles; tile += SUM_PARTS)
      sum += p.sums[(int64_t)tile * p.chunk_rows + in_chunk];
  parts[part][x] = sum;
  __syncthreads();
  if (part > 0 || !exists) return;
  for (int i = 1; i < SUM_PARTS; i++) sum += parts[i][x];
  const float max = p.reference[in_chunk];
  if (p.row_target[row] >= 0) sum += expf(p.target_logit[row] - max);
  const float log_sum = logf(sum);
  const float lse = max + log_sum;
  if (!(fabsf(log_sum) < FAR)) atomicMax(p.redo, *p.count);
  const uint32_t position = p.row_position[row];
  const bool in_range = p.row_target[row] >= 0;
  p.packed[position] = in_range ? (max - p.target_logit[row]) + log_sum + z_part(p.z_loss, lse) : NAN;
  p.packed[(int64_t)p.positions + position] = lse;
  p.row_max[row] = in_range ? max : NAN;
  p.row_log_sum[row] = log_sum;
}

struct SharesParams {
  const float *row_max, *row_log_sum;
  const uint32_t *count;
  float *shares;  // out: (chunk_rows)
  uint32_t first_row;
  float z_loss;
};

struct FactorParams {
  const float *row_max, *row_log_sum, *target_logit;
  const int32_t *row_target;
  const uint32_t *count, *redo;
  float *factor, *target_part;  // out: (chunk_rows)
  void *gathered;               // (chunk_rows, hidden), in and out, or null
  int64_t hidden;
  uint32_t first_row, mean;
  float softcap, z_loss;
};

// What the gradient kernel multiplies the softmax of a row by where a chunk is done again.
extern "C" __global__ void softmax_shares(const SharesParams p) {
  const uint32_t in_chunk = blockIdx.x * blockDim.x + threadIdx.x, row = p.first_row + in_chunk;
  if (row < *p.count) p.shares[in_chunk] = softmax_share(p.z_loss, p.row_max[row] + p.row_log_sum[row]);
}

// One block a row. What turns probabilities into the gradient of the loss: the factor of the row, by which its row of E
// is multiplied too so that G^T E needs none, and the target's entry. That stays in f32: the rounded factors would
// spoil it, and it is most of the gradient of a fresh head.
template <typename T> __device__ void factor_rows(const FactorParams &p) {
  const uint32_t row = p.first_row + blockIdx.x, count = *p.count;
  if (row >= count) return;
  const bool redone = *p.redo;
  const float log_sum = p.row_log_sum[row];
  // NaN for a bad target; of what was done again, all but the mean is in place.
  const float max = p.row_max[row], share = softmax_share(p.z_loss, max + log_sum);
  const float to_softmax = redone ? 1.f : share * expf(-log_sum) + (max - max), mean = p.mean ? 1.f / count : 1.f;
  const float factor = mean * to_softmax;
  if (p.gathered) {
    T *e = (T *)p.gathered + blockIdx.x * p.hidden;
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) e[i] = from_float<T>(factor * to_float(e[i]));
  }
  if (threadIdx.x > 0) return;
  p.factor[blockIdx.x] = factor;
  float entry = 0.f;  // what was done again has it in place
  if (!redone && p.row_target[row] >= 0) {
    const float logit = p.target_logit[row], log_p = (logit - max) - log_sum;
    const float part = p.softcap > 0.f ? logit / p.softcap : 0.f;
    // share p - 1, with p - 1 of a confident target without cancellation.
    entry = mean * ((share - 1.f) * expf(log_p) + expm1f(log_p)) * (1.f - part * part);
  }
  p.target_part[blockIdx.x] = entry;
}

struct SortParams {
  const int32_t *row_target;
  const uint32_t *count;
  uint32_t *sorted_row;    // out: (rows), rows of the chunk
  int32_t *sorted_target;  // out: (rows)
  uint32_t first_row, rows;
};

// The rows of a chunk by target, then by row. One warp a row, which counts those before it.
extern "C" __global__ void sort_targets(const SortParams p) {
  const uint32_t lane = threadIdx.x % 32, in_chunk = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const uint32_t all = *p.count, rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
  if (in_chunk >= rows) return;
  const int32_t *targets = p.row_target + p.first_row, target = targets[in_chunk];
  uint32_t before = 0;
  for (uint32_t i = lane; i < rows; i += 32) before += targets[i] < target || (targets[i] == target && i < in_chunk);
  for (int i = 16; i; i >>= 1) before += __shfl_xor_sync(0xffffffff, before, i);
  if (lane == 0) p.sorted_row[before] = in_chunk, p.sorted_target[before] = target;
}

struct TargetsParams {
  const void *embeddings;
  const float *target_part;  // (rows)
  const uint32_t *row_embedding;
  const uint32_t *sorted_row;  // (rows)
  const int32_t *sorted_target;
  const uint32_t *count;
  uint32_t *slots;     // (vocab) zero; out: 1 + the slot of a class that is a target
  float *target_rows;  // out: (slots, hidden), or null
  float *target_bias;  // out: (slots)
  int64_t hidden;
  uint32_t first_row, rows;
};

constexpr int TARGET_THREADS = 256, TARGET_COLUMNS = 1024;

// The targets' part of the gradients of the classifier and the bias. A block adds the rows of one target, in their
// order, for a slice of the columns; it is the block of the first of them.
template <typename T> __device__ void sum_targets(const TargetsParams &p) {
  const uint32_t all = *p.count, rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0, first = blockIdx.x;
  if (first >= rows) return;
  const int target = p.sorted_target[first];
  if (target < 0 || (first > 0 && p.sorted_target[first - 1] == target)) return;
  uint32_t end = first;
  for (int found = TARGET_THREADS; found == TARGET_THREADS; end += found) {
    const uint32_t at = end + threadIdx.x;
    found = __syncthreads_count(at < rows && p.sorted_target[at] == target);
  }
  float sum[TARGET_COLUMNS / TARGET_THREADS] = {}, of_bias = 0.f;
  const int64_t column = (int64_t)blockIdx.y * TARGET_COLUMNS + threadIdx.x;
#pragma unroll 8
  for (uint32_t at = first; at < end; at++) {
    const uint32_t row = p.sorted_row[at];
    const T *e = (const T *)p.embeddings + p.row_embedding[p.first_row + row] * p.hidden;
    const float part = p.target_part[row];
    of_bias += part;
#pragma unroll
    for (int i = 0; i < TARGET_COLUMNS / TARGET_THREADS; i++)
      if (column + i * TARGET_THREADS < p.hidden) sum[i] += part * to_float(e[column + i * TARGET_THREADS]);
  }
  if (p.target_rows) {
#pragma unroll
    for (int i = 0; i < TARGET_COLUMNS / TARGET_THREADS; i++)
      if (column + i * TARGET_THREADS < p.hidden) p.target_rows[first * p.hidden + column + i * TARGET_THREADS] = sum[i];
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) p.slots[target] = first + 1, p.target_bias[first] = of_bias;
}

struct UpstreamParams {
  const float *upstream;  // one number
  void *gradient;         // in and out
  int64_t numbers;
};

// A gradient times the upstream gradient, which is 1 more often than not.
template <typename T> __device__ void scale_gradient(const UpstreamParams &p) {
  const float scale = *p.upstream;
  if (scale == 1.f) return;
  constexpr int WIDTH = 16 / sizeof(T);
  const auto times = [scale](T &x) { x = from_float<T>(scale * to_float(x)); };
  const int64_t thread = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, chunks = p.numbers / WIDTH;
  for (int64_t i = thread; i < chunks; i += (int64_t)gridDim.x * blockDim.x) {
    uint4 chunk = ((uint4 *)p.gradient)[i];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) times(((T *)&chunk)[j]);
    ((uint4 *)p.gradient)[i] = chunk;
  }
  if (thread < p.numbers % WIDTH) times(((T *)p.gradient)[chunks * WIDTH + thread]);
}

#define FUSED(SUFFIX, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(TILE) reference_logits_##SUFFIX(const ReferenceParams p) {   \
    reference_logits<T>(p);                                                                                  \
  }                                                                                                          \
  extern "C" __global__ void factor_rows_##SUFFIX(const FactorParams p) { factor_rows<T>(p); }              \
  extern "C" __global__ void __launch_bounds__(TARGET_THREADS) sum_targets_##SUFFIX(const TargetsParams p) { \
    sum_targets<T>(p);                                                                                       \
  }                                                                                                          \
  extern "C" __global__ void scale_gradient_##SUFFIX(const UpstreamParams p) { scale_gradient<T>(p); }
FUSED(bf16, __nv_bfloat16)

// ---------------------------------------------------------------- backward

struct ScaleParams {
  const float *upstream;  // gradient of the packed vector: losses (positions), lse (positions), loss (1)
  const float *row_max, *row_log_sum;
  const uint32_t *row_position;
  const uint32_t *count;
  float *p_scale, *target_scale;  // out: (rows), of the softmax and of the one-hot
  float *scale;                   // out: one number, on the finished gradients
  uint32_t positions, mean;
  float z_loss;
};

// With the upstream gradients g of a row's loss (through the reduced loss or not) and h of its lse, the gradient of
// its logits is (g + h) softmax(z) - g onehot(y), and g has a share more in the softmax where there is a z-loss.
// The largest of these goes into `scale` and out of the rows, so
// that no product of half-precision numbers underflows for a mean over many.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) upstream_scales(const ScaleParams p) {
  const uint32_t count = *p.count;
  const float loss = p.upstream[2 * (int64_t)p.positions] * (p.mean && count ? 1.f / count : 1.f);
  const auto share = [&](uint64_t row) { return softmax_share(p.z_loss, p.row_max[row] + p.row_log_sum[row]); };
  float largest = 0.f;
  for (uint64_t row = threadIdx.x; row < count; row += ONE_BLOCK) {
    const uint32_t position = p.row_position[row];
    const float g = p.upstream[position] + loss, h = p.upstream[(int64_t)p.positions + position];
    largest = fmaxf(largest, fmaxf(fabsf(g), fabsf(g * share(row) + h)));
  }
  largest = block_reduce<ONE_BLOCK>(largest, [](float a, float b) { return fmaxf(a, b); });
  // A power of two, so that dividing by it and multiplying again rounds nothing.
  const float scale = largest > 0.f && largest < INFINITY ? exp2f(ceilf(log2f(fmaxf(largest, 1e-30f)))) : 1.f;
  const float inverse = 1.f / scale;
  for (uint64_t row = threadIdx.x; row < count; row += ONE_BLOCK) {
    const uint32_t position = p.row_position[row];
    const float g = p.upstream[position] + loss, h = p.upstream[(int64_t)p.positions + position];
    p.p_scale[row] = (g * share(row) + h) * inverse;
    p.target_scale[row] = g * inverse;
  }
  if (threadIdx.x == 0) *p.scale = scale;
}

struct FinishParams {
  const float *sums;         // (rows of this launch, hidden)
  const float *target_part;  // (rows of this launch), or null: it is in the sums
  const int32_t *row_target;
  const void *classifier;
  const uint32_t *row_embedding;
  const uint32_t *count;
  const float *scale;      // one number, or null: 1
  const float *row_scale;  // (rows of this launch), or null: 1
  void *embeddings_grad;   // (.., hidden), zeroed
  int64_t hidden;
  uint32_t first_row;
};

// One block a row. T is the dtype of the classifier.
template <typename T, typename Out> __device__ void finish_embeddings(const FinishParams &p) {
  const uint32_t row = p.first_row + blockIdx.x;
  if (row >= *p.count) return;
  const float *from = p.sums + blockIdx.x * p.hidden;
  Out *into = (Out *)p.embeddings_grad + p.row_embedding[row] * p.hidden;
  const float on_all = p.scale ? *p.scale : 1.f, scale = on_all * (p.row_scale ? p.row_scale[blockIdx.x] : 1.f);
  if (!p.target_part) {
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) into[i] = from_float<Out>(scale * from[i]);
    return;
  }
  const float part = on_all * p.target_part[blockIdx.x];
  const T *of_target = (const T *)p.classifier + max(p.row_target[row], 0) * p.hidden;
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x)
    into[i] = from_float<Out>(scale * from[i] + part * to_float(of_target[i]));
}

struct BiasParams {
  const void *gradient;  // (rows, range)
  const uint32_t *count;
  const uint8_t *keep;     // of row 0, or null
  const float *scale;      // one number, or null: 1
  const float *row_scale;  // (rows), or null: 1
  const uint32_t *slots;   // (vocab) of TargetsParams, or null
  const float *target_bias;
  const float *shares;      // (vocab) of ShareParams, or null: nothing is averaged
  const float *mass_sums;   // (class_tiles) sums of the averaged masses, upstream gradients included
  void *bias_grad;  // (vocab)
  int64_t vocab, first_class, range;
  uint32_t first_row;  // that row 0 of the gradient is, a multiple of 128
  uint32_t rows;       // at most
  uint32_t class_tiles;
  uint32_t overwrite;  // 0: add to what is there
};

constexpr int BIAS_COLUMNS = 32, BIAS_PARTS = 8;

// A block sums 32 columns, in 8 interleaved parts of the rows.
template <typename T> __device__ void bias_gradient(const BiasParams &p) {
  __shared__ float parts[BIAS_PARTS][BIAS_COLUMNS];
  const int column = threadIdx.x % BIAS_COLUMNS, part = threadIdx.x / BIAS_COLUMNS;
  const int64_t in_range = (int64_t)blockIdx.x * BIAS_COLUMNS + column, at = p.first_class + in_range;
  const uint32_t all = *p.count, count = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
  float sum = 0.f;
  if (at < p.vocab) {
    for (uint32_t tile = 0; tile * (uint64_t)TILE < count; tile++) {
      if (p.keep &&
          !(p.keep[(int64_t)(p.first_row / TILE + tile) * p.class_tiles + at / TILE] & KEEP_FOR_CLASSIFIER))
        continue;
      const uint32_t rows = min((uint32_t)TILE, count - tile * TILE);
      for (uint32_t i = part; i < rows; i += BIAS_PARTS) {
        const float g = to_float(((const T *)p.gradient)[((int64_t)tile * TILE + i) * p.range + in_range]);
        sum += p.row_scale ? p.row_scale[tile * TILE + i] * g : g;
      }
    }
  }
  parts[part][column] = sum;
  __syncthreads();
  if (part == 0 && at < p.vocab) {
    for (int i = 1; i < BIAS_PARTS; i++) sum += parts[i][column];
    if (p.slots && p.slots[at]) sum += p.target_bias[p.slots[at] - 1];
    if (p.shares) sum += p.shares[at] * p.mass_sums[at / TILE];
    T &out = ((T *)p.bias_grad)[at];
    out = from_float<T>((p.scale ? *p.scale : 1.f) * sum + (p.overwrite ? 0.f : to_float(out)));
  }
}

#define PER_DTYPE(SUFFIX, T)                                                                                      \
  extern "C" __global__ void finish_embeddings_##SUFFIX(const FinishParams p) { finish_embeddings<T, T>(p); }    \
  /* A shard's part of a sum over ranks, which is not rounded yet. */                                            \
  extern "C" __global__ void finish_part_##SUFFIX(const FinishParams p) { finish_embeddings<T, float>(p); }      \
  extern "C" __global__ void __launch_bounds__(BIAS_COLUMNS * BIAS_PARTS) bias_gradient_##SUFFIX(const BiasParams p) { bias_gradient<T>(p); }
PER_DTYPE(bf16, __nv_bfloat16)
PER_DTYPE(f16, __half)
PER_DTYPE(f32, float)
