// Around the products of gradients formed in the forward.
#include "classifier.cuh"
#include "terms.cuh"
#include "vectors.cuh"

// A chunk of rows: what is theirs alone begins at the chunk's first row, the rest at row 0.
struct ReferenceParams {
  const void *gathered;  // (chunk_rows, hidden)
  ClassifierParams classifier;
  const void *bias;
  const int32_t *row_target;
  const uint32_t *count;
  float *reference;  // out: (chunk_rows)
  int64_t hidden;
  uint32_t first_row;
  float softcap, logit_scale;
};

// The logit of a row's target: what its probabilities are measured from, for lse is never below it and seldom far
// above. 0 where that is no finite number; NaN, so that all is done again, where the target is no class. One warp a row.
template <typename T> __device__ void reference_logits(const ReferenceParams &p) {
  const uint32_t in_chunk = (blockIdx.x * blockDim.x + threadIdx.x) / 32, row = p.first_row + in_chunk;
  if (row >= *p.count) return;
  const int target = p.row_target[row];
  float sum = 0.f;
  if (target >= 0) {
    const T *e = (const T *)p.gathered + in_chunk * p.hidden;
    for (int64_t i = threadIdx.x % 32; i < p.hidden; i += 32) sum += to_float(e[i]) * class_number<T>(p.classifier, target, i);
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, i);
    if (p.bias) sum += to_float(((const T *)p.bias)[target]);
    sum *= p.logit_scale;
    if (p.softcap > 0.f) sum = p.softcap * fast_tanh(sum / p.softcap);
  }
  if (threadIdx.x % 32 == 0) p.reference[in_chunk] = target < 0 ? NAN : fabsf(sum) < INFINITY ? sum : 0.f;
}

struct SumsParams {
  const float *reference;  // (chunk_rows)
  const float *sums;       // (class tiles, chunk_rows), targets left out
  const float *outputs;    // (3, class tiles, chunk_rows), as `probabilities` leaves them, or null
  const float *target_logit;
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count;
  float *row_max, *row_log_sum;  // out
  float *row_entropy;            // out, where there are outputs
  float *packed;                 // out: loss, lse
  float *entropy;                // out: (positions), or null
  uint32_t *predicted;           // out: (positions), or null
  uint32_t *redo;                // zero; out: the count if a sum left the range, so that all must be done again
  uint32_t *again;               // as RebaseParams, zero, or null: probabilities have the range of bf16
  TermsParams terms;
  uint32_t first_row, chunk_rows, class_tiles, positions;
};

// exp(+-FAR) times any softmax that matters is a normal bf16 number, and f32 sums of them are finite.
constexpr float FAR = 60.f;
constexpr int SUM_ROWS = 32, SUM_PARTS = ONE_BLOCK / SUM_ROWS;

// No number of a tile is above the sum of its row, and f16 ends at 65,504. A row's sum is 1 at least, but for rounding, where
// its reference is its target's logit; else its factor may be more than f16 has.
constexpr float LARGEST_SUM = 60000.f, LEAST_LOG_SUM = -0.5f;

// The likeliest of some classes: the lowest of several.
struct Best {
  float logit;
  uint32_t at;

  __device__ __forceinline__ void merge(float other_logit, uint32_t other) {
    if (other_logit > logit || (other_logit == logit && other < at)) logit = other_logit, at = other;
  }
};

// Entropy and likeliest class of the rows of a block, from their tiles; `sum` is that of each row, in the first part, which
// gets the entropy.
__device__ float merge_outputs(const SumsParams &p, uint32_t in_chunk, bool exists, float sum) {
  __shared__ float weighted_parts[SUM_PARTS][SUM_ROWS];
  __shared__ Best best_parts[SUM_PARTS][SUM_ROWS];
  const uint32_t x = threadIdx.x % SUM_ROWS, part = threadIdx.x / SUM_ROWS, row = p.first_row + in_chunk;
  const int64_t plane = (int64_t)p.class_tiles * p.chunk_rows;
  float weighted = 0.f;
  Best best = {-INFINITY, 0};
  if (exists)
    for (uint32_t tile = part; tile < p.class_tiles; tile += SUM_PARTS) {
      const float *of_tile = p.outputs + (int64_t)tile * p.chunk_rows + in_chunk;
      weighted += of_tile[0];
      best.merge(of_tile[plane], __float_as_uint(of_tile[2 * plane]));
    }
  weighted_parts[part][x] = weighted, best_parts[part][x] = best;
  __syncthreads();
  if (part > 0 || !exists) return 0.f;
  for (int i = 1; i < SUM_PARTS; i++) {
    weighted += weighted_parts[i][x];
    best.merge(best_parts[i][x].logit, best_parts[i][x].at);
  }
  weighted /= LOG2E;
  const int target = p.row_target[row];
  if (target >= 0) {
    const float logit = p.target_logit[row], from_reference = logit - p.reference[in_chunk];
    weighted += expf(from_reference) * fmaxf(from_reference, LEAST_EXPONENT);
    best.merge(logit, target);
  }
  const uint32_t position = p.row_position[row];
  const float entropy = logf(sum) - weighted / sum;
  p.row_entropy[row] = entropy;
  if (p.entropy) p.entropy[position] = entropy;
  if (p.predicted) p.predicted[position] = best.at;
  return entropy;
}

// 32 rows a block, 32 interleaved parts of the class tiles.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) merge_sums(const SumsParams p) {
  __shared__ float parts[SUM_PARTS][SUM_ROWS];
  const uint32_t x = threadIdx.x % SUM_ROWS, part = threadIdx.x / SUM_ROWS;
  const uint32_t in_chunk = blockIdx.x * SUM_ROWS + x, row = p.first_row + in_chunk;
  const bool exists = in_chunk < p.chunk_rows && row < *p.count;
  float sum = 0.f, largest = 0.f;
  if (exists)
    for (uint32_t tile = part; tile < p.class_tiles; tile += SUM_PARTS) {
      const float of_tile = p.sums[(int64_t)tile * p.chunk_rows + in_chunk];
      sum += of_tile, largest = fmaxf(largest, of_tile);
    }
  if (p.again && largest > LARGEST_SUM) {
    atomicMax(p.again, *p.count);
    p.again[1 + in_chunk / TILE] = 1;
  }
  parts[part][x] = sum;
  __syncthreads();
  float max = 0.f;
  if (part == 0 && exists) {
    for (int i = 1; i < SUM_PARTS; i++) sum += parts[i][x];
    max = p.reference[in_chunk];
    if (p.row_target[row] >= 0) sum += expf(p.target_logit[row] - max);
  }
  const float entropy = p.outputs ? merge_outputs(p, in_chunk, exists, sum) : 0.f;
  if (part > 0 || !exists) return;
  const float log_sum = logf(sum);
  if (!(fabsf(log_sum) < FAR) || (p.again && log_sum < LEAST_LOG_SUM)) atomicMax(p.redo, *p.count);
  const bool in_range = p.row_target[row] >= 0;
  write_row(p, row, max, log_sum, p.target_logit + row, entropy, in_range, in_range);
}

struct RebaseParams {
  uint32_t *again;               // the count if a row tile is to be done again, else 0; then of each row tile whether it is
  uint8_t *keep;                 // out: (row tiles, class tiles), what is done again
  float *reference;              // (chunk_rows), and all rows' parts of lse: in and out
  float *row_max, *row_log_sum;
  const uint32_t *count;
  uint32_t first_row, class_tiles;
};

// Probabilities that f16 has no room for are written again, measured from lse: the largest is then 2^10. One block a row
// tile, a thread a row.
constexpr float ABOVE_REFERENCE = 10.f / LOG2E;

extern "C" __global__ void __launch_bounds__(TILE) rebase_rows(const RebaseParams p) {
  if (*p.again == 0) return;
  const uint32_t in_chunk = blockIdx.x * TILE + threadIdx.x, row = p.first_row + in_chunk;
  const bool again = p.again[1 + blockIdx.x];
  for (uint32_t tile = threadIdx.x; tile < p.class_tiles; tile += TILE) p.keep[blockIdx.x * p.class_tiles + tile] = again;
  if (!again || row >= *p.count) return;
  const float max = p.row_max[row], log_sum = p.row_log_sum[row], next = max + (log_sum - ABOVE_REFERENCE);
  p.reference[in_chunk] = next, p.row_max[row] = next, p.row_log_sum[row] = log_sum - (next - max);
}

// What gradients in f16 are multiplied by until the backward asks for them, for they may lie below what f16 has before the
// upstream gradient, a loss scale often, is known. Powers of two.
struct UnitsParams {
  const void *embeddings;
  const uint32_t *row_embedding, *count;
  uint32_t *largest;  // zero; out: the bits of the largest magnitude of an embedding
  float *units;       // out: Units
  int64_t columns, embeddings_stride;
  TermsParams terms;
  uint32_t mean;
  float logit_scale;
};

struct Units {
  float rows;                                  // of the rows of E that dC is summed from
  float embeddings, classifier, target, bias;  // what finished sums, those of such rows and of targets are multiplied by
  float of_embeddings, of_classifier, of_bias; // what then leads to the gradients: the inverses of their units
};

// One block a row.
template <typename T> __device__ void largest_embedding(const UnitsParams &p) {
  const uint32_t row = blockIdx.x;
  if (row >= *p.count) return;
  const T *e = (const T *)p.embeddings + p.row_embedding[row] * p.embeddings_stride;
  float largest = 0.f;
  for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) {
    const float size = fabsf(to_float(e[i]));
    largest = size > largest || isnan(size) ? size : largest;
  }
  atomicMax(p.largest, __reduce_max_sync(0xffffffff, __float_as_uint(largest)));
}

// The largest power of two that is not above x.
__device__ __forceinline__ float power_below(float x) { return ldexpf(1.f, ilogbf(x)); }

extern "C" __global__ void gradient_units(const UnitsParams p) {
  const float count = fmaxf(*p.count, 1.f), largest = __uint_as_float(*p.largest);
  const float on_all = p.logit_scale * (p.mean ? 1.f / mean_divisor(p.terms, *p.count) : 1.f);
  // No entry of the gradient of the logits is above 1 before `on_all`: so a row of dE is at most twice the largest class, and
  // one of dC as many embeddings as there are rows.
  const float of_all = fabsf(on_all), most = largest < INFINITY ? fmaxf(largest, 1e-6f) : 1.f;
  Units units;
  units.rows = power_below(32768.f / most);
  const float de = power_below(0.25f / of_all), db = power_below(16384.f / (of_all * count));
  const float dc = power_below(32768.f / (of_all * count * most));
  units.embeddings = de * on_all, units.target = dc * on_all, units.bias = db * on_all;
  units.classifier = units.target / units.rows;
  units.of_embeddings = 1.f / de, units.of_classifier = 1.f / dc, units.of_bias = 1.f / db;
  *(Units *)p.units = units;
}

struct SharesParams {
  const float *row_max, *row_log_sum;
  const float *row_entropy;  // or null: the loss has none
  const uint32_t *row_position;
  const uint32_t *count;
  float *softmax, *one_hot;  // out: (chunk_rows)
  float *log;                // out: (chunk_rows), where there is an entropy
  TermsParams terms;
  uint32_t first_row, positions;
};

struct FactorParams {
  const float *row_max, *row_log_sum, *target_logit;
  const float *row_entropy;  // or null: the loss has none
  const uint32_t *row_position;
  const int32_t *row_target;
  const uint32_t *count, *redo;
  float *factor, *target_part;  // out: (chunk_rows)
  void *gathered;               // (chunk_rows, columns), in and out, or null
  const float *unit;            // of these, or null: 1
  int64_t columns, gathered_stride;  // of those to multiply; from one row to the next
  TermsParams terms;
  uint32_t first_row, positions, mean;
  float softcap, logit_scale;
};

struct EntropyParams {
  void *gradient;  // (chunk_rows, stride), in and out
  const float *row_max, *row_log_sum, *row_entropy;
  const uint32_t *row_position;
  const uint32_t *count, *redo;
  int64_t stride;   // from one row to the next
  int64_t classes;  // to the end of the last tile
  TermsParams terms;
  uint32_t first_row, positions;
};

constexpr int ENTROPY_THREADS = 256, ENTROPY_COLUMNS = 8192;

// Of a loss with a factor e of the entropy H, what the softmax has in its gradient differs from class to class: s - e (H +
// log p). It goes into the stored exp(z - reference), whose own logarithm is that of p but for a term of the row's: off by
// the rounding of what is stored, 2^-9 at most. A block has some columns of a row.
template <typename T> __device__ void add_entropy(const EntropyParams &p) {
  const uint32_t row = p.first_row + blockIdx.x;
  if (row >= *p.count || *p.redo) return;
  const Terms terms = terms_of(p.terms, p.row_position[row], p.positions);
  const float log_sum = p.row_log_sum[row], to_log = -terms.entropy;
  const float to_all = terms.softmax(p.row_max[row] + log_sum) + to_log * (p.row_entropy[row] - log_sum);
  constexpr int WIDTH = 16 / sizeof(T);
  T *gradient = (T *)p.gradient + blockIdx.x * p.stride;
  constexpr int STEP = ENTROPY_THREADS * WIDTH, STEPS = ENTROPY_COLUMNS / STEP;
  const int64_t first = (int64_t)blockIdx.y * ENTROPY_COLUMNS + threadIdx.x * WIDTH;
  // All are asked for before the first is needed.
  Numbers<T, WIDTH> numbers[STEPS];
#pragma unroll
  for (int i = 0; i < STEPS; i++)
    if (first + i * STEP < p.classes) numbers[i] = Numbers<T, WIDTH>::load(gradient + first + i * STEP);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    if (first + i * STEP >= p.classes) return;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
      const float x = numbers[i].get(j);
      numbers[i].set(j, x * fmaf(to_log, fmaxf(__logf(x), LEAST_EXPONENT), to_all));
    }
    numbers[i].store(gradient + first + i * STEP);
  }
}

// What the gradient kernel multiplies the softmax, its logarithm and the one-hot of a row by where a chunk is done again.
extern "C" __global__ void row_shares(const SharesParams p) {
  const uint32_t in_chunk = blockIdx.x * blockDim.x + threadIdx.x, row = p.first_row + in_chunk;
  if (row >= *p.count) return;
  const Terms terms = terms_of(p.terms, p.row_position[row], p.positions);
  float softmax = terms.softmax(p.row_max[row] + p.row_log_sum[row]);
  if (p.row_entropy) softmax -= terms.entropy * p.row_entropy[row], p.log[in_chunk] = -terms.entropy;
  p.softmax[in_chunk] = softmax;
  p.one_hot[in_chunk] = terms.nll;
}

// One block a row. What turns probabilities into the gradient of the loss: the factor of the row, by which its row of E
// is multiplied too so that G^T E needs none, and the target's entry. That stays in f32: the rounded factors would
// spoil it, and it is most of the gradient of a fresh head.
template <typename T> __device__ void factor_rows(const FactorParams &p) {
  const uint32_t row = p.first_row + blockIdx.x, count = *p.count;
  if (row >= count) return;
  const bool redone = *p.redo;
  const float log_sum = p.row_log_sum[row];
  // NaN for a bad target; of what was done again, all but the factors of all rows is in place.
  const Terms terms = terms_of(p.terms, p.row_position[row], p.positions);
  const float max = p.row_max[row], share = terms.softmax(max + log_sum);
  // What the softmax has with an entropy differs from class to class, and is in place.
  const float of_row = p.row_entropy ? 1.f : share;
  const float to_softmax = redone ? 1.f : of_row * expf(-log_sum) + (max - max);
  const float of_all = p.logit_scale * (p.mean ? 1.f / mean_divisor(p.terms, count) : 1.f), factor = of_all * to_softmax;
  if (p.gathered) {
    T *e = (T *)p.gathered + blockIdx.x * p.gathered_stride;
    const float on_row = p.unit ? *p.unit * factor : factor;
    for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) e[i] = from_float<T>(on_row * to_float(e[i]));
  }
  if (threadIdx.x > 0) return;
  p.factor[blockIdx.x] = factor;
  float entry = 0.f;  // what was done again has it in place
  if (!redone && p.row_target[row] >= 0) {
    const float logit = p.target_logit[row], log_p = (logit - max) - log_sum;
    const float part = p.softcap > 0.f ? logit / p.softcap : 0.f;
    float in_softmax = share;
    if (p.row_entropy) in_softmax -= terms.entropy * (p.row_entropy[row] + fmaxf(log_p, LEAST_EXPONENT));
    // in_softmax p - nll, with p - 1 of a confident target without cancellation.
    entry = of_all * ((in_softmax - terms.nll) * expf(log_p) + terms.nll * expm1f(log_p)) * (1.f - part * part);
  }
  p.target_part[blockIdx.x] = entry;
}

struct TargetsParams {
  const void *embeddings;
  const float *target_part;  // (rows)
  const uint32_t *row_embedding;
  const uint32_t *sorted_row;  // (rows)
  const int32_t *sorted_target;
  const uint32_t *count;
  uint32_t *slots;     // (vocab) zero; out: 1 + the slot of a class that is a target
  float *target_rows;  // out: (slots, target_columns), or null
  float *target_bias;  // out: (slots)
  const float *unit;   // of target_rows, or null: 1
  int64_t columns;            // of the embeddings, those that the gradient has
  int64_t embeddings_stride;  // from one row of the embeddings to the next
  int64_t target_columns;     // of target_rows, zeros from `columns` on
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
    const T *e = (const T *)p.embeddings + p.row_embedding[p.first_row + row] * p.embeddings_stride;
    const float part = p.target_part[row];
    of_bias += part;
#pragma unroll
    for (int i = 0; i < TARGET_COLUMNS / TARGET_THREADS; i++)
      if (column + i * TARGET_THREADS < p.columns) sum[i] += part * to_float(e[column + i * TARGET_THREADS]);
  }
  if (p.target_rows) {
    const float unit = p.unit ? *p.unit : 1.f;
#pragma unroll
    for (int i = 0; i < TARGET_COLUMNS / TARGET_THREADS; i++)
      if (column + i * TARGET_THREADS < p.target_columns)
        p.target_rows[first * p.target_columns + column + i * TARGET_THREADS] = unit * sum[i];
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) p.slots[target] = first + 1, p.target_bias[first] = of_bias;
}

struct UpstreamParams {
  const float *upstream;  // one number
  const float *unit;      // that the gradient is without, or null: 1
  void *gradient;         // in and out
  int64_t numbers;
};

// A gradient times the upstream gradient, which is 1 more often than not.
template <typename T> __device__ void scale_gradient(const UpstreamParams &p) {
  const float scale = p.unit ? *p.upstream * *p.unit : *p.upstream;
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
  extern "C" __global__ void __launch_bounds__(ENTROPY_THREADS) add_entropy_##SUFFIX(const EntropyParams p) { \
    add_entropy<T>(p);                                                                                       \
  }                                                                                                          \
  extern "C" __global__ void factor_rows_##SUFFIX(const FactorParams p) { factor_rows<T>(p); }              \
  extern "C" __global__ void largest_embedding_##SUFFIX(const UnitsParams p) { largest_embedding<T>(p); }   \
  extern "C" __global__ void __launch_bounds__(TARGET_THREADS) sum_targets_##SUFFIX(const TargetsParams p) { \
    sum_targets<T>(p);                                                                                       \
  }                                                                                                          \
  extern "C" __global__ void scale_gradient_##SUFFIX(const UpstreamParams p) { scale_gradient<T>(p); }
FUSED(bf16, __nv_bfloat16)
FUSED(f16, __half)

static_assert(ENTROPY_THREADS == 256 && ENTROPY_COLUMNS == 8192 && sizeof(Units) == 8 * 4, "the host mirrors these");
