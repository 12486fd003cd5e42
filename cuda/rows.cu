// The rows that count: picked, gathered, sorted by target.
#include "common.cuh"

constexpr uint32_t NONE = 0xffffffff;

struct PickParams {
  const void *targets;      // (batch * time), i64, u32 or i32
  uint32_t *row_embedding;  // out, in the order of the positions
  uint32_t *row_position;
  int32_t *row_target;      // row of the classifier, -1 where out of range or in the shard of another rank
  uint32_t *count;          // out: rows that count, first target out of range (its index, or NONE)
  float *packed;            // loss (positions), lse (positions): zeroed where a position does not count
  float *entropy;           // (positions), likewise, or null
  uint32_t *predicted;      // (positions): there NONE, or null
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
      if (p.entropy) p.entropy[position] = 0.f;
      if (p.predicted) p.predicted[position] = NONE;
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

struct PadParams {
  const void *matrix;             // (.., columns), half-precision numbers
  const uint32_t *row_embedding;  // or null: row by row
  const uint32_t *count;          // with row_embedding
  void *padded;                   // out: (rows of this launch, padded_columns), zeros past the columns and for rows there are not
  int64_t columns, padded_columns;
  uint32_t first_row;
  uint32_t pairs;                 // rows of the matrix are of whole words, and so is where it begins
};

template <typename Word> __device__ void pad_row(const PadParams &p, int64_t row, bool exists) {
  constexpr int NUMBERS = sizeof(Word) / 2;
  const int64_t columns = exists ? p.columns / NUMBERS : 0, padded = p.padded_columns / NUMBERS;
  const Word *from = (const Word *)p.matrix + row * (p.columns / NUMBERS);
  Word *into = (Word *)p.padded + blockIdx.x * padded;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < padded; i += blockDim.x) into[i] = i < columns ? from[i] : Word(0);
}

// One block a row: rows that do not begin on 16 bytes, one after the other so that they do.
extern "C" __global__ void pad_rows(const PadParams p) {
  const uint32_t at = p.first_row + blockIdx.x;
  const bool exists = !p.row_embedding || at < *p.count;
  const int64_t row = p.row_embedding && exists ? p.row_embedding[at] : at;
  if (p.pairs)
    pad_row<uint32_t>(p, row, exists);
  else
    pad_row<uint16_t>(p, row, exists);
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
