// Around the products of the backward: upstream gradients, and writing dE and db.
#include "classifier.cuh"
#include "terms.cuh"

struct ScaleParams {
  const float *upstream;  // gradient of the packed vector: losses (positions), lse (positions), loss (1), entropy (positions)
  const float *row_max, *row_log_sum;
  const float *row_entropy;  // or null: no gradient goes through it
  const uint32_t *row_position;
  const uint32_t *count;
  float *p_scale, *target_scale;  // out: (rows), of the softmax and of the one-hot
  float *log_scale;               // out: (rows), of the softmax times its logarithm, where there is an entropy
  float *scale;                   // out: one number, on the finished gradients
  TermsParams terms;
  uint32_t positions, mean;
  float logit_scale;
};

// With the upstream gradients g of a row's loss (through the reduced loss or not), h of its lse and k of its entropy H (its
// own or through the loss), the gradient of its logits is (g s + h - k H - k log p) p - g t onehot(y), where s and t are what the row's terms have of the
// softmax and the one-hot. The largest of these factors goes into `scale` and out of the rows, so that no product of
// half-precision numbers underflows for a mean over many.
struct RowScales {
  float p, target, log;
};

__device__ __forceinline__ RowScales scales_of(const ScaleParams &p, float loss, uint64_t row) {
  const uint32_t position = p.row_position[row];
  const int64_t n = p.positions;
  const Terms terms = terms_of(p.terms, position, p.positions);
  const float g = p.upstream[position] + loss, h = p.upstream[n + position];
  RowScales scales = {g * terms.softmax(p.row_max[row] + p.row_log_sum[row]) + h, g * terms.nll, 0.f};
  if (p.row_entropy) {
    const float k = p.upstream[2 * n + 1 + position] + g * terms.entropy;
    scales.p -= k * p.row_entropy[row], scales.log = -k;
  }
  return scales;
}

extern "C" __global__ void __launch_bounds__(ONE_BLOCK) upstream_scales(const ScaleParams p) {
  const uint32_t count = *p.count;
  const float loss = p.upstream[2 * (int64_t)p.positions] * (p.mean ? 1.f / mean_divisor(p.terms, count) : 1.f);
  float largest = 0.f;
  for (uint64_t row = threadIdx.x; row < count; row += ONE_BLOCK) {
    const RowScales scales = scales_of(p, loss, row);
    largest = fmaxf(largest, fmaxf(fmaxf(fabsf(scales.p), fabsf(scales.target)), fabsf(scales.log)));
  }
  largest = block_reduce<ONE_BLOCK>(largest, [](float a, float b) { return fmaxf(a, b); });
  // A power of two, so that dividing by it and multiplying again rounds nothing.
  const float scale = largest > 0.f && largest < INFINITY ? exp2f(ceilf(log2f(fmaxf(largest, 1e-30f)))) : 1.f;
  const float inverse = 1.f / scale;
  for (uint64_t row = threadIdx.x; row < count; row += ONE_BLOCK) {
    const RowScales scales = scales_of(p, loss, row);
    p.p_scale[row] = scales.p * inverse;
    p.target_scale[row] = scales.target * inverse;
    if (p.log_scale) p.log_scale[row] = scales.log * inverse;
  }
  if (threadIdx.x == 0) *p.scale = scale * p.logit_scale;
}

struct FinishParams {
  const float *sums;         // (rows of this launch, hidden)
  const float *target_part;  // (rows of this launch), or null: it is in the sums
  const int32_t *row_target;
  ClassifierParams classifier;
  const uint32_t *row_embedding;
  const uint32_t *count;
  const float *scale;      // one number, or null: 1
  const float *row_scale;  // (rows of this launch), or null: 1
  void *embeddings_grad;   // (.., embedding_columns), zeroed
  int64_t hidden, embedding_columns;
  uint32_t first_row;
};

// One block a row. T is the dtype of the classifier.
template <typename T, typename Out> __device__ void finish_embeddings(const FinishParams &p) {
  const uint32_t row = p.first_row + blockIdx.x;
  if (row >= *p.count) return;
  const float *from = p.sums + blockIdx.x * p.hidden;
  Out *into = (Out *)p.embeddings_grad + p.row_embedding[row] * p.embedding_columns;
  const float on_all = p.scale ? *p.scale : 1.f, scale = on_all * (p.row_scale ? p.row_scale[blockIdx.x] : 1.f);
  if (!p.target_part) {
    for (int64_t i = threadIdx.x; i < p.embedding_columns; i += blockDim.x) into[i] = from_float<Out>(scale * from[i]);
    return;
  }
  const float part = on_all * p.target_part[blockIdx.x];
  const int target = max(p.row_target[row], 0);
  for (int64_t i = threadIdx.x; i < p.embedding_columns; i += blockDim.x)
    into[i] = from_float<Out>(scale * from[i] + part * class_number<T>(p.classifier, target, i));
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
  uint32_t overwrite;  // 1 for the first chunk of rows, 0: add to `bias_sums`
  float *bias_sums;    // (vocab) what several chunks of rows leave for the next, or null
  uint32_t last;       // 1 for the last chunk of rows, which rounds to T
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
    const float now = (p.scale ? *p.scale : 1.f) * sum + (p.overwrite ? 0.f : p.bias_sums[at]);
    if (p.last)
      ((T *)p.bias_grad)[at] = from_float<T>(now);
    else
      p.bias_sums[at] = now;
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
