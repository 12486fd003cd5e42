// Keys, each with a value, in the order of the keys; equal keys stay in the order they had. A pass sorts by one digit,
// the lowest first: `count_digits`, `first_places` and `place`. Counts are integers, so the order of atomics is no matter.
#include "common.cuh"

constexpr int DIGIT_BITS = 9, DIGITS = 1 << DIGIT_BITS;
constexpr int SORT_THREADS = 256, SORT_WARPS = SORT_THREADS / 32;
constexpr int EACH = 16;  // keys of a thread
constexpr int SORT_TILE = SORT_THREADS * EACH;

struct SortParams {
  const uint32_t *keys, *values;  // (count)
  uint32_t *sorted_keys;          // out
  uint32_t *sorted_values;        // out
  uint32_t *places;               // (DIGITS, tiles): how many keys of a tile have a digit, then where the first of them goes
  uint32_t count, tiles, shift, unused;
};

__device__ __forceinline__ uint32_t digit_of(const SortParams &p, uint32_t key) { return key >> p.shift & (DIGITS - 1); }

// One block a tile.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) count_digits(const SortParams p) {
  __shared__ uint32_t counts[DIGITS];
  for (int i = threadIdx.x; i < DIGITS; i += SORT_THREADS) counts[i] = 0;
  __syncthreads();
  const uint32_t first = blockIdx.x * SORT_TILE, end = min(first + SORT_TILE, p.count);
  for (uint32_t at = first + threadIdx.x; at < end; at += SORT_THREADS) atomicAdd(&counts[digit_of(p, p.keys[at])], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < DIGITS; i += SORT_THREADS) p.places[(int64_t)i * p.tiles + blockIdx.x] = counts[i];
}

// The sums of all counts before each, in place. One block, whose threads have four each at a time.
extern "C" __global__ void __launch_bounds__(ONE_BLOCK) first_places(const SortParams p) {
  __shared__ uint32_t warp_sums[ONE_BLOCK / 32];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t fours = (int64_t)DIGITS / 4 * p.tiles;
  uint4 *places = (uint4 *)p.places;
  uint32_t total = 0;
  for (int64_t first = 0; first < fours; first += ONE_BLOCK) {
    const int64_t i = first + threadIdx.x;
    const uint4 counts = i < fours ? places[i] : make_uint4(0, 0, 0, 0);
    const uint32_t own = counts.x + counts.y + counts.z + counts.w;
    uint32_t upto = own;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffff, upto, step);
      if (lane >= step) upto += before;
    }
    if (lane == 31) warp_sums[warp] = upto;
    __syncthreads();
    uint32_t place = total + upto - own;
    for (uint32_t w = 0; w < ONE_BLOCK / 32; w++) {
      if (w < warp) place += warp_sums[w];
      total += warp_sums[w];
    }
    const uint32_t second = place + counts.x, third = second + counts.y;
    if (i < fours) places[i] = make_uint4(place, second, third, third + counts.z);
    __syncthreads();
  }
}

// One block a tile, of which each warp has a part.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) place(const SortParams p) {
  __shared__ uint32_t places[SORT_WARPS][DIGITS];
  for (int i = threadIdx.x; i < SORT_WARPS * DIGITS; i += SORT_THREADS) places[i / DIGITS][i % DIGITS] = 0;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t first = blockIdx.x * SORT_TILE + warp * (SORT_TILE / SORT_WARPS) + lane;
  uint32_t keys[EACH], before[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const bool exists = first + i * 32 < p.count;
    keys[i] = exists ? p.keys[first + i * 32] : 0;
    const uint32_t digit = exists ? digit_of(p, keys[i]) : DIGITS;
    const uint32_t same = __match_any_sync(0xffffffff, digit), lower = __popc(same & ((1u << lane) - 1));
    if (exists) before[i] = places[warp][digit] + lower;
    __syncwarp();
    if (exists && lower == 0) places[warp][digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < DIGITS; digit += SORT_THREADS) {
    uint32_t at = p.places[(int64_t)digit * p.tiles + blockIdx.x];
    for (int w = 0; w < SORT_WARPS; w++) {
      const uint32_t count = places[w][digit];
      places[w][digit] = at;
      at += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (first + i * 32 >= p.count) continue;
    const uint32_t at = places[warp][digit_of(p, keys[i])] + before[i];
    p.sorted_keys[at] = keys[i];
    p.sorted_values[at] = p.values[first + i * 32];
  }
}

static_assert(DIGIT_BITS == 9 && SORT_THREADS == 256 && SORT_TILE == 4096, "the host mirrors these");
