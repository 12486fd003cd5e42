// Forward: logits tile by tile, of which only a running (max, sum) per row, the target's logit and, for the
// gradient filter, what every row has in every tile of classes leave the chip.
//
// A block owns 128 rows and one split of the classes, and walks the split's tiles as one long product, so that
// the loads of a tile run during the epilogue of the one before. Splits are fixed by the launch: same bits every run.
#pragma once
#include "mainloop_sm80.cuh"
#include <type_traits>

struct ForwardParams {
  const void *embeddings;         // (.., hidden)
  ClassifierParams classifier;    // (vocab, hidden)
  const void *bias;               // (vocab), or null
  const uint32_t *row_embedding;  // (rows)
  const int32_t *row_target;      // (rows), -1 for a target out of range
  const uint32_t *count;          // rows there are
  float2 *partials;               // (splits, group_rows): running maximum, sum of exp(z - maximum)
  float *target_logit;            // (rows)
  void *statistics;               // (class tiles, group_rows) TileStatistics<T>, or null
  float2 *extra;                  // (splits, group_rows): RowSum's weighted sum, and its class as bits; where OUTPUTS
  int64_t hidden, vocab;
  uint32_t first_row, group_rows;  // the rows of this launch; group_rows is a multiple of 128
  uint32_t splits;
  float softcap;  // 0 for none
  float logit_scale;
  uint32_t aligned;
};

template <typename T, int BN> struct ForwardShared {
  using Loop = Pipeline<T, BN, K_MAJOR, K_MAJOR>;
  uint8_t stages[Loop::BYTES];
  TileStatistics<T> statistics[4][BM];  // of a warp's columns, for the filter
  int32_t target[BM];
};

// OUTPUTS: also what entropy and the likeliest class need.
template <typename T, int BN, bool ALIGNED, bool OUTPUTS> struct Forward {
  using State = std::conditional_t<OUTPUTS, RowSum, MaxSum>;
  using Loop = typename ForwardShared<T, BN>::Loop;
  using Shared = ForwardShared<T, BN>;
  static constexpr int NB = Accumulators<BN>::BLOCKS_N;
  static constexpr int WARP_COLUMNS = BN / 4;

  const ForwardParams &p;
  Shared &shared;
  Place at;
  // Lane q of the four that share a row's columns keeps the running state of the thread's rows 2q and 2q + 1.
  State running[2];

  __device__ __forceinline__ Forward(const ForwardParams &p, Shared &shared) : p(p), shared(shared) {}

  // From products to logits, in place.
  __device__ __forceinline__ void finish_logits(Accumulators<BN> &z, int64_t column0) const {
    const T *bias = (const T *)p.bias;
    const bool capped = p.softcap > 0.f;
    if (!bias && !capped && p.logit_scale == 1.f && column0 + BN <= p.vocab) return;
    const float inverse_softcap = 1.f / p.softcap;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int64_t column = column0 + at.template column<BN>(n) + j;
        const bool valid = column < p.vocab;
        const float b = bias && valid ? to_float(bias[column]) : 0.f;
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float &value = z.acc[m][n][half * 2 + j];
            value = (value + b) * p.logit_scale;
            if (capped) value = p.softcap * fast_tanh(value * inverse_softcap);
            if (!valid) value = MASKED;
          }
        }
      }
    }
  }

  // The target of this row lies in this warp's columns: the thread that holds its logit writes it out and takes it out
  // of the tile. Returns it there, 0 in other threads.
  __device__ __forceinline__ float take_target(float (*z)[4], int half, int offset, uint32_t row) const {
    float logit = 0.f;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (n * 8 + (at.lane & 3) * 2 + j == offset) {
          p.target_logit[row] = logit = z[n][half * 2 + j];
          z[n][half * 2 + j] = MASKED;
        }
    }
    return logit;
  }

  // sum of exp(z - max) times the softcap's derivative.
  __device__ __forceinline__ float mass(const float (*z)[4], int half, float max) const {
    const float inverse_softcap = 1.f / p.softcap;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float logit = z[n][half * 2 + j], part = logit * inverse_softcap;
        sum += fast_exp(logit - max) * fmaxf(1.f - part * part, 0.f);
      }
    }
    return sum;
  }

  __device__ __forceinline__ void reduce_rows(Accumulators<BN> &z, int64_t column0, uint32_t row0) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int m = i >> 1, half = i & 1;
      const int row = at.row(m, half);
      const int64_t offset = shared.target[row] - (column0 + at.warp_n * WARP_COLUMNS);
      const bool target_here = offset >= 0 && offset < WARP_COLUMNS;
      float target = target_here ? take_target(z.acc[m], half, (int)offset, row0 + row) : 0.f;
      float max = MASKED;
#pragma unroll
      for (int n = 0; n < NB; n++) max = fmaxf(max, fmaxf(z.acc[m][n][half * 2], z.acc[m][n][half * 2 + 1]));
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
      float sum = 0.f, weighted = 0.f;
      uint32_t best = ~0u;
#pragma unroll
      for (int n = 0; n < NB; n++)
        if constexpr (OUTPUTS) {
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const float logit = z.acc[m][n][half * 2 + j], exponent = logit - max, term = fast_exp(exponent);
            sum += term, weighted += term * fmaxf(exponent, LEAST_EXPONENT);
            if (logit == max) best = min(best, (uint32_t)column0 + at.template column<BN>(n) + j);
          }
        } else {
          sum += fast_exp(z.acc[m][n][half * 2] - max) + fast_exp(z.acc[m][n][half * 2 + 1] - max);
        }
      float mass = p.statistics && p.softcap > 0.f ? this->mass(z.acc[m], half, max) : sum;
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        mass += __shfl_xor_sync(0xffffffff, mass, lanes);
        target += __shfl_xor_sync(0xffffffff, target, lanes);
        if constexpr (OUTPUTS) {
          weighted += __shfl_xor_sync(0xffffffff, weighted, lanes);
          best = min(best, __shfl_xor_sync(0xffffffff, best, lanes));
        }
      }
      if ((at.lane & 3) == i / 2) {
        State &state = running[i & 1];
        if constexpr (OUTPUTS) {
          state.merge(max, sum, weighted, best);
          if (target_here) state.merge(target, 1.f, 0.f, shared.target[row]);
        } else {
          state.merge(max, sum);
          if (target_here) state.merge(target, 1.f);
        }
      }
      if (p.statistics && (at.lane & 3) == 0) shared.statistics[at.warp_n][row] = TileStatistics<T>::pack(max, mass);
    }
  }

  // What a row has in 128 classes.
  __device__ __forceinline__ void write_statistics(int64_t column0, uint32_t row_in_group) const {
    __syncthreads();
    constexpr int WARPS_PER_TILE = TILE / WARP_COLUMNS;
    const int row = threadIdx.x % BM, part = threadIdx.x / BM;
    if (part < BN / TILE && column0 + part * TILE < p.vocab) {
      MaxSum all;
#pragma unroll
      for (int w = 0; w < WARPS_PER_TILE; w++) {
        const float2 of_warp = shared.statistics[part * WARPS_PER_TILE + w][row].unpack();
        all.merge(of_warp.x, of_warp.y);
      }
      auto *to = (TileStatistics<T> *)p.statistics + (column0 / TILE + part) * p.group_rows + row_in_group;
      to[row] = TileStatistics<T>::pack(all.max, all.sum);
    }
  }

  __device__ __forceinline__ void run() {
    const uint32_t row_tiles = p.group_rows / BM;
    const uint32_t row_in_group = (blockIdx.x % row_tiles) * BM, split = blockIdx.x / row_tiles;
    const uint32_t row0 = p.first_row + row_in_group, count = *p.count;
    if (row0 >= count) return;

    const int64_t tiles = (p.vocab + BN - 1) / BN;
    const int64_t first = tiles * split / p.splits, last = tiles * (split + 1) / p.splits;
    const int hidden = (int)p.hidden, k_blocks = (hidden + BK<T> - 1) / BK<T>;
    const T *e = (const T *)p.embeddings;

    if (threadIdx.x < BM) shared.target[threadIdx.x] = row0 + threadIdx.x < count ? p.row_target[row0 + threadIdx.x] : -1;
    using Rows = KMajorShare<T, BM>;
    using Classes = KMajorShare<T, BN>;
    const T *rows[Rows::COUNT];
#pragma unroll
    for (int i = 0; i < Rows::COUNT; i++) {
      const uint32_t row = min(row0 + Rows::row(i), count - 1);
      rows[i] = e + p.row_embedding[row] * p.hidden + Rows::column();
    }
    const uint32_t valid_rows = existing<Rows::COUNT, Rows::APART>(count - row0 - Rows::row(0));

    // What to load next: step of k, this thread's first class there, which of its classes exist.
    int64_t load_class = first * BN + Classes::row(0);
    uint32_t valid_classes = existing<Classes::COUNT, Classes::APART>(p.vocab - load_class);
    int load_k = 0;
    // What to finish next.
    int64_t tile = first;
    int k = 0;
    Accumulators<BN> z;
    z.clear();
    const Loop loop{shared_address(shared.stages)};
    loop.run(
        z, (int)(last - first) * k_blocks,
        [&](int, uint32_t a_tile, uint32_t b_tile) {
          Rows::template load<ALIGNED>(a_tile, [&](int i) { return rows[i]; }, load_k, hidden, valid_rows);
          load_classes<T, BN, ALIGNED>(b_tile, p.classifier, load_class, load_k, valid_classes);
          load_k += BK<T>;
          if (load_k >= hidden) {
            load_k = 0, load_class += BN;
            valid_classes = existing<Classes::COUNT, Classes::APART>(p.vocab - load_class);
          }
        },
        [&](int) {
          if (++k < k_blocks) return;
          finish_logits(z, tile * BN);
          reduce_rows(z, tile * BN, row0);
          if (p.statistics) write_statistics(tile * BN, row_in_group);
          z.clear();
          k = 0, tile++;
        });

    // The four warps' columns of a row, merged in order.
    State(*parts)[BM] = reinterpret_cast<State(*)[BM]>(shared.stages);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if ((at.lane & 3) == i / 2) parts[at.warp_n][at.row(i >> 1, i & 1)] = running[i & 1];
    __syncthreads();
    if (threadIdx.x < BM) {
      State all = parts[0][threadIdx.x];
      const int64_t to = (int64_t)split * p.group_rows + row_in_group + threadIdx.x;
      for (int w = 1; w < 4; w++) {
        const State part = parts[w][threadIdx.x];
        if constexpr (OUTPUTS)
          all.merge(part.max, part.sum, part.weighted, part.best);
        else
          all.merge(part.max, part.sum);
      }
      p.partials[to] = make_float2(all.max, all.sum);
      if constexpr (OUTPUTS) p.extra[to] = make_float2(all.weighted, __uint_as_float(all.best));
    }
  }
};

#define FORWARD(NAME, T, BN, OUTPUTS)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const ForwardParams p) {        \
    extern __shared__ __align__(128) uint8_t memory[];                                          \
    auto &shared = *reinterpret_cast<ForwardShared<T, BN> *>(memory);                           \
    if (p.aligned)                                                                              \
      Forward<T, BN, true, OUTPUTS>(p, shared).run();                                           \
    else                                                                                        \
      Forward<T, BN, false, OUTPUTS>(p, shared).run();                                          \
  }
