// Gradient of the logits, for a range of classes, into a workspace: the logits again, then
// G = p_scale * softmax(z) - target_scale * onehot(target), times the softcap's derivative.
//
// Tiles of which no gradient needs a part leave at once. The one-hot is subtracted in f32: rounding the softmax
// first would lose the gradient of confident targets.
#include "mainloop_sm80.cuh"

struct GradientParams {
  const void *embeddings;
  ClassifierParams classifier;
  const void *bias;
  const uint32_t *row_embedding;
  const int32_t *row_target;
  const uint32_t *count;
  const float *row_max, *row_log_sum;     // (rows): lse = row_max + row_log_sum
  const float *p_scale, *target_scale;    // (rows)
  const float *log_scale;                 // (rows): of p log p, or null
  const uint8_t *keep;                    // (row tiles, class tiles), or null: every tile
  void *gradient;                         // (rows of this launch, range), in the inputs' dtype
  int64_t hidden, vocab;
  int64_t first_class, range;             // multiples of 128; range is the leading dimension of `gradient` too
  uint32_t first_row;                     // multiple of 128
  uint32_t class_tiles;
  float softcap, logit_scale;
  uint32_t aligned;
};

template <typename T, int BN> struct GradientShared {
  using Loop = Pipeline<T, BN, K_MAJOR, K_MAJOR>;
  static constexpr int STAGING = BM * BN * (int)sizeof(T);
  union {
    uint8_t stages[Loop::BYTES];
    uint8_t gradient[STAGING];
  };
};

template <typename T, int BN, bool ALIGNED> __device__ __forceinline__ void gradient(const GradientParams &p, GradientShared<T, BN> &shared) {
  using Loop = typename GradientShared<T, BN>::Loop;
  constexpr int NB = Accumulators<BN>::BLOCKS_N;
  // Blocks that run together share classes: rows first.
  const uint32_t row_in_launch = blockIdx.x * BM, row0 = p.first_row + row_in_launch, count = *p.count;
  const int64_t column_in_range = (int64_t)blockIdx.y * BN, column0 = p.first_class + column_in_range;
  if (row0 >= count || column0 >= p.vocab) return;
  if (p.keep) {
    const uint8_t *keep = p.keep + (int64_t)(row0 / TILE) * p.class_tiles + column0 / TILE;
    bool any = false;
    for (int i = 0; i < BN / TILE; i++) any |= column0 + i * TILE < p.vocab && keep[i];
    if (!any) return;
  }

  const T *e = (const T *)p.embeddings, *bias = (const T *)p.bias;
  using Rows = KMajorShare<T, BM>;
  using Classes = KMajorShare<T, BN>;
  const T *rows[Rows::COUNT];
#pragma unroll
  for (int i = 0; i < Rows::COUNT; i++) {
    const uint32_t row = min(row0 + Rows::row(i), count - 1);
    rows[i] = e + p.row_embedding[row] * p.hidden + Rows::column();
  }
  const uint32_t valid_rows = existing<Rows::COUNT, Rows::APART>(count - row0 - Rows::row(0));
  const int64_t my_class = column0 + Classes::row(0);
  const uint32_t valid_classes = existing<Classes::COUNT, Classes::APART>(p.vocab - my_class);
  const int hidden = (int)p.hidden;

  const Place at;
  Accumulators<BN> z;
  z.clear();
  const Loop loop{shared_address(shared.stages)};
  loop.run(
      z, (hidden + BK<T> - 1) / BK<T>,
      [&](int block, uint32_t a_tile, uint32_t b_tile) {
        Rows::template load<ALIGNED>(a_tile, [&](int i) { return rows[i]; }, block * BK<T>, hidden, valid_rows);
        load_classes<T, BN, ALIGNED>(b_tile, p.classifier, my_class, block * BK<T>, valid_classes);
      },
      [](int) {});

  const bool capped = p.softcap > 0.f;
  const float inverse_softcap = 1.f / p.softcap;
  T(*staging)[BN] = reinterpret_cast<T(*)[BN]>(shared.gradient);
  // Rotating a row's 16-byte chunks by the row spreads the writes of a warp over the banks.
  const auto rotated = [](int row, int column) {
    const int chunk = column / PER_CHUNK<T>;
    return ((chunk ^ (row & 7)) * PER_CHUNK<T>) + column % PER_CHUNK<T>;
  };
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int m = i >> 1, half = i & 1, in_tile = at.row(m, half);
    const uint32_t row = row0 + in_tile;
    const bool counts = row < count;
    const float max = counts ? p.row_max[row] : 0.f, log_sum = counts ? p.row_log_sum[row] : 0.f;
    const float p_scale = counts ? p.p_scale[row] : 0.f, target_scale = counts ? p.target_scale[row] : 0.f;
    const float log_scale = counts && p.log_scale ? p.log_scale[row] : 0.f;
    const int64_t target = (counts ? p.row_target[row] : -1) - column0;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = at.template column<BN>(n) + j;
        float g = 0.f;
        if (counts && column0 + column < p.vocab) {
          float value = z.acc[m][n][half * 2 + j];
          if (bias) value += to_float(bias[column0 + column]);
          value *= p.logit_scale;
          float derivative = 1.f;
          if (capped) {
            const float t = fast_tanh(value * inverse_softcap);
            value = p.softcap * t;
            derivative = 1.f - t * t;
          }
          const float log_p = (value - max) - log_sum;
          g = p_scale * fast_exp(log_p);
          if (log_scale != 0.f) g += log_scale * fast_exp(log_p) * fmaxf(log_p, LEAST_EXPONENT);
          if (target == column) g -= target_scale;
          g *= derivative;
        }
        staging[in_tile][rotated(in_tile, column)] = from_float<T>(g);
      }
    }
  }
  __syncthreads();
  constexpr int CHUNKS = BN / PER_CHUNK<T>;
  for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    if (column_in_range + chunk * PER_CHUNK<T> < p.range)
      *reinterpret_cast<uint4 *>((T *)p.gradient + (int64_t)(row_in_launch + row) * p.range + column_in_range + chunk * PER_CHUNK<T>) =
          *reinterpret_cast<const uint4 *>(&staging[row][(chunk ^ (row & 7)) * PER_CHUNK<T>]);
  }
}

#define GRADIENT(NAME, T, BN, BLOCKS)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const GradientParams p) {    \
    extern __shared__ __align__(128) uint8_t memory[];                                            \
    auto &shared = *reinterpret_cast<GradientShared<T, BN> *>(memory);                            \
    if (p.aligned)                                                                                \
      gradient<T, BN, true>(p, shared);                                                           \
    else                                                                                          \
      gradient<T, BN, false>(p, shared);                                                          \
  }

// The wide form is faster where every tile is kept, the narrow one skips tile by tile.
GRADIENT(gradient_sm80_bf16, __nv_bfloat16, 256, 1)
GRADIENT(gradient_sm80_f16, __half, 256, 1)
GRADIENT(gradient_sm80_f32, float, 128, 1)
GRADIENT(gradient_narrow_sm80_bf16, __nv_bfloat16, 128, 2)
GRADIENT(gradient_narrow_sm80_f16, __half, 128, 2)
GRADIENT(gradient_narrow_sm80_f32, float, 128, 1)
