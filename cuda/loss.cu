// lse and nll of the rows from the partial results of the forward, or of all ranks; the loss.
#include "common.cuh"
#include "loss.cuh"

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

extern "C" __global__ void merge_partials(const MergeParams p) {
  const uint32_t in_group = blockIdx.x * blockDim.x + threadIdx.x, row = p.first_row + in_group;
  if (in_group >= p.group_rows || row >= *p.count) return;
  MaxSum all;
  for (uint32_t split = 0; split < p.splits; split++) {
    const float2 part = p.partials[(int64_t)split * p.group_rows + in_group];
    all.merge(part.x, part.y);
  }
  const bool in_range = p.row_target[row] >= 0;
  write_row(p, row, all.max, logf(all.sum), p.target_logit + row, in_range, in_range || p.sharded);
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
  const bool on_one_rank = p.all[2 * n + row] == 1.f;
  write_row(p, row, p.max[row], logf(p.all[row]), p.all + n + row, on_one_rank, on_one_rank);
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
