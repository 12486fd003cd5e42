// lse and nll of the rows from the partial results of the forward, or of all ranks; the loss.
#include "common.cuh"
#include "terms.cuh"

struct MergeParams {
  const float2 *partials;  // (splits, group_rows)
  const float *target_logit;
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count;
  float *row_max, *row_log_sum;  // out
  float *packed;                 // out: loss, lse
  const float2 *extra;           // (splits, group_rows): RowSum's weighted sum, and its class as bits; or null
  float *row_entropy;            // out, where there is `extra`
  float *entropy;                // out: (positions), or null
  uint32_t *predicted;           // out: (positions), or null
  TermsParams terms;
  uint32_t first_row, group_rows, splits, positions;
  uint32_t sharded;  // the target may be another rank's: `merge_shards` has the last word
};

extern "C" __global__ void merge_partials(const MergeParams p) {
  const uint32_t in_group = blockIdx.x * blockDim.x + threadIdx.x, row = p.first_row + in_group;
  if (in_group >= p.group_rows || row >= *p.count) return;
  RowSum all;
  for (uint32_t split = 0; split < p.splits; split++) {
    const int64_t at = (int64_t)split * p.group_rows + in_group;
    const float2 part = p.partials[at], more = p.extra ? p.extra[at] : make_float2(0.f, 0.f);
    all.merge(part.x, part.y, more.x, __float_as_uint(more.y));
  }
  const bool in_range = p.row_target[row] >= 0;
  const float log_sum = logf(all.sum);
  const float entropy = p.extra ? log_sum - all.weighted / all.sum : 0.f;
  write_row(p, row, all.max, log_sum, p.target_logit + row, entropy, in_range, in_range || p.sharded);
  if (!p.extra) return;
  const uint32_t position = p.row_position[row];
  p.row_entropy[row] = entropy;
  if (p.entropy) p.entropy[position] = entropy;
  if (p.predicted) p.predicted[position] = all.best;
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
  TermsParams terms;
  uint32_t positions;
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
  write_row(p, row, p.max[row], logf(p.all[row]), p.all + n + row, 0.f, on_one_rank, on_one_rank);
}

struct LossParams {
  float *packed;  // losses (positions), lse (positions), loss (1): out
  const uint32_t *count;
  TermsParams terms;
  uint32_t positions, mean;
};

// The sum of the losses, or their mean.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) reduce_loss(const LossParams p) {
  double sum = 0.;
  for (uint64_t i = threadIdx.x; i < p.positions; i += ONE_BLOCK) sum += p.packed[i];
  sum = block_reduce<ONE_BLOCK>(sum, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) p.packed[2 * (int64_t)p.positions] = (float)(p.mean ? sum / mean_divisor(p.terms, *p.count) : sum);
}
