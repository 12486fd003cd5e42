// How a tile of dC is written: what other pieces, chunks of rows, targets and averages add to a product.
#pragma once
#include "between.cuh"
#include "product_tiles_sm90a.cuh"

// Adds what the same thread left of earlier pieces of a product of dC and, but for the last piece, leaves the sum.
template <int R>
__device__ __forceinline__ void add_piece(float (&product)[2][R], float* partials, uint32_t group, bool first, bool last) {
  float* mine = partials + static_cast<size_t>(blockIdx.x * CONSUMERS + group) * TILE_N * GROUP + threadIdx.x % GROUP;
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    float& sum = product[i / R][i % R];
    if (!first) sum += mine[i * GROUP];
    if (!last) mine[i * GROUP] = sum;
  }
}

// Where what is added to a class of dC in f32 lies: 1 + its row, or 0.
__device__ __forceinline__ uint32_t target_slot(const ProductParams& p, uint32_t row) {
  return p.slots && row < p.vocab ? p.slots[row] : 0;
}
__device__ __forceinline__ const float* target_row(const ProductParams& p, uint32_t slot) {
  return slot ? p.target_rows + static_cast<size_t>(slot - 1) * p.hidden : nullptr;
}

// The averages' row of a tile, for a group's columns, as f32 into shared memory.
template <typename T>
__device__ __forceinline__ void stage_masses(float (&to)[TILE_N], const ProductParams& p, uint32_t group, uint32_t tile,
                                             uint32_t first_column, uint32_t end_column) {
  const T* from = static_cast<const T*>(p.mass_rows) + static_cast<size_t>(tile) * p.hidden;
  named_wait(BIAS + group, GROUP);  // the last tile's have been read
  for (uint32_t i = threadIdx.x % GROUP * 2; i < TILE_N; i += GROUP * 2) {
    const float2 masses =
        first_column + i < end_column ? unpack<T>(*reinterpret_cast<const uint32_t*>(from + first_column + i))
                                      : make_float2(0.0f, 0.0f);
    to[i] = masses.x, to[i + 1] = masses.y;
  }
  named_wait(BIAS + group, GROUP);
}

// The exponents of a block's columns, which begin at `first_column`.
template <bool MIXED>
__device__ __forceinline__ uint8_t* exponents_of(const ProductParams& p, uint32_t first_column) {
  if constexpr (MIXED) {
    const uint32_t whole = p.wide * STRIP;
    const uint32_t strip =
        first_column < whole ? first_column / STRIP : p.wide + (first_column - whole) / (CLUSTER * NARROW);
    return p.exponents + static_cast<size_t>(strip * CLUSTER + cluster_rank()) * p.vocab;
  }
  return p.exponents + static_cast<size_t>(first_column / STRIP * CLUSTER + cluster_rank()) * p.vocab;
}

// What a lane has of a row of dC that does not begin on 16 bytes: two neighbouring numbers of every 8. A row of an even number
// begins on two of them, else on one. No branch and no address of a pair's own: each would cost registers.
struct RaggedRow {
  uint16_t* first;  // of the lane's numbers
  int even, odd;    // numbers from there on to the row's end, or none: in rows of an even number, and of an odd one

  __device__ __forceinline__ RaggedRow(const ProductParams& p, uint32_t row, uint32_t column) {
    first = static_cast<uint16_t*>(p.out) + static_cast<size_t>(row) * p.grad_columns + column;
    const int left = row < p.vocab ? static_cast<int>(p.grad_columns) - static_cast<int>(column) : 0;
    even = p.grad_columns % 2 ? 0 : left, odd = p.grad_columns % 2 ? left : 0;
  }
  __device__ __forceinline__ uint32_t load(int at) const {
    uint32_t pair = 0, second = 0;
    if (at < even) pair = *reinterpret_cast<const uint32_t*>(first + at);
    if (at < odd) pair = first[at];
    if (at + 1 < odd) second = first[at + 1];
    return pair | second << 16;
  }
  __device__ __forceinline__ void store(int at, uint32_t pair) const {
    if (at < even) *reinterpret_cast<uint32_t*>(first + at) = pair;
    if (at < odd) first[at] = pair;
    if (at + 1 < odd) first[at + 1] = pair >> 16;
  }
};

// dC: scaled; what earlier chunks of rows left is added; rounded by the last chunk, which may be the only one. RAGGED: rows of
// dC do not begin on 16 bytes.
template <typename T, bool AVERAGED, bool MIXED, bool RAGGED, int R>
__device__ __forceinline__ void write_classes(float (&product)[2][R], const ProductParams& p, const float* masses,
                                              uint32_t first_class, uint32_t first_column, uint32_t end_column) {
  const float scale = p.scale ? *p.scale : 1.0f;
  const uint32_t lane_column = first_column + 8 * (threadIdx.x % 4);
  uint8_t* exponents = exponents_of<MIXED>(p, first_column);
  uint32_t slot[4];
  float share[4];
  uint2 listed[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_class + s / 2 * 64 + s % 2 * 8;
    slot[s] = target_slot(p, row);
    if constexpr (AVERAGED) {
      share[s] = row < p.vocab ? __ldg(p.shares + row) : 0.0f;
      listed[s] = p.list && row < p.vocab ? __ldg(p.list + row) : make_uint2(0, 0);
    }
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_class + s / 2 * 64 + s % 2 * 8;
    T* to = static_cast<T*>(p.out) + static_cast<size_t>(row) * p.hidden + lane_column;
    const RaggedRow ragged(p, row, first_column + threadIdx.x % 4 * 2);
    const float* more = target_row(p, slot[s]);
    const bool any_listed = AVERAGED && __any_sync(~0u, listed[s].x != 0);
    const T* target = nullptr;
    if (AVERAGED && listed[s].x) {
      const void* rows = listed[s].x & COMBINED ? p.combined : p.embeddings;
      target = static_cast<const T*>(rows) + static_cast<size_t>((listed[s].x & ~COMBINED) - 1) * p.hidden;
    }
    const float unit = !p.overwrite && row < p.vocab ? Between::unit(exponents[row]) : 0.0f;
    // Each lane loads the 16 bytes that it will write, all before the first is needed; then they are dealt out as the
    // product lies. Of a ragged row, as it lies.
    uint4 old[R / 16];
#pragma unroll
    for (int first = 0; first < R / 4; first += 4) {
      old[first / 4] = make_uint4(0, 0, 0, 0);
      if constexpr (RAGGED) {
        const auto pair = [&](int i) { return ragged.load(8 * (first + i)); };
        if (!p.overwrite) old[first / 4] = make_uint4(pair(0), pair(1), pair(2), pair(3));
      } else if (!p.overwrite && row < p.vocab && lane_column + 8 * first < end_column)
        old[first / 4] = *reinterpret_cast<const uint4*>(to + 8 * first);
    }
    uint32_t largest = 0;  // of the absolute values, as bits
#pragma unroll
    for (int first = 0; first < R / 4; first += 4) {
      const uint4 dealt = RAGGED || p.overwrite ? old[first / 4] : deal_chunk(old[first / 4]);
      const uint32_t before[4] = {dealt.x, dealt.y, dealt.z, dealt.w};
      uint32_t of_target[4] = {};
      if (AVERAGED && any_listed) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t column = first_column + 8 * (first + i) + threadIdx.x % 4 * 2;
          // That nothing writes them meanwhile lets the compiler load them early.
          if (target && column < end_column) of_target[i] = __ldg(reinterpret_cast<const uint32_t*>(target + column));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * (first + i) + 2 * (s % 2);
        float& x = product[s / 2][j];
        float& y = product[s / 2][j + 1];
        float2 was = Between::unpack(before[i], unit);
        const uint32_t column = first_column + 8 * (first + i) + threadIdx.x % 4 * 2;
        if (more && column < end_column) {
          const float2 target = *reinterpret_cast<const float2*>(more + column);
          was.x += target.x, was.y += target.y;
        }
        if (AVERAGED && column < end_column) {
          const float2 mass = *reinterpret_cast<const float2*>(masses + 8 * (first + i) + threadIdx.x % 4 * 2);
          x = fmaf(share[s], mass.x, x), y = fmaf(share[s], mass.y, y);
          const float2 e = unpack<T>(of_target[i]);
          const float entry = __uint_as_float(listed[s].y);
          x = fmaf(entry, e.x, x), y = fmaf(entry, e.y, y);
        }
        x = fmaf(scale, x, was.x), y = fmaf(scale, y, was.y);
        largest = max(largest, max(__float_as_uint(x) & 0x7FFFFFFF, __float_as_uint(y) & 0x7FFFFFFF));
      }
    }
    const auto store = [&](auto word_of) {
#pragma unroll
      for (int first = 0; first < R / 4; first += 4) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 4 * (first + i) + 2 * (s % 2);
          word[i] = word_of(product[s / 2][j], product[s / 2][j + 1]);
        }
        if constexpr (RAGGED) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ragged.store(8 * (first + i), word[i]);
        } else {
          const uint4 chunk = collect_chunk(word[0], word[1], word[2], word[3]);
          if (row < p.vocab && lane_column + 8 * first < end_column) *reinterpret_cast<uint4*>(to + 8 * first) = chunk;
        }
      }
    };
    if (p.last) {
      store([](float x, float y) { return pack<T>(x, y); });
    } else {
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const uint32_t exponent = Between::exponent(largest);
      if (row < p.vocab && threadIdx.x % 4 == 0) exponents[row] = exponent;
      const float per_unit = Between::per_unit(exponent);
      store([=](float x, float y) { return Between::pack(x, y, per_unit); });
    }
  }
}

// Of classes to which nothing was kept by the first of several chunks.
template <bool MIXED>
__device__ void clear_exponents(const ProductParams& p, uint32_t first_class, uint32_t first_column) {
  const uint32_t row = first_class + threadIdx.x % GROUP;
  if (row < p.vocab) exponents_of<MIXED>(p, first_column)[row] = Between::LEAST;
}
