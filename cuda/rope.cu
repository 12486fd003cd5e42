// Rotary position embedding: number i of the first half of the rotated dimensions and number i of the second are
// turned by the angle of the position. The gradient is the turn by the opposite angle.
#include "vectors.cuh"

constexpr int ROW_THREADS = 128;

struct RopeParams {
  const void *x;          // (batch, time, heads, head_dim), the last dimension contiguous
  const float *cos, *sin; // (time, pairs)
  void *out;              // the same, contiguous
  int64_t batch_stride, time_stride, head_stride;
  uint32_t time, heads, head_dim, pairs;
  float direction;        // 1, or -1 for the gradient
  uint32_t aligned;
};

// A block has the heads of a position, a thread N pairs of a head or N numbers that are not rotated.
template <typename T, int N> __device__ void turn(const RopeParams &p) {
  const uint32_t turned = p.pairs / N, units = turned + (p.head_dim - 2 * p.pairs) / N;
  const uint32_t index = blockIdx.y * ROW_THREADS + threadIdx.x, head = index / units, unit = index % units;
  if (head >= p.heads) return;
  const uint32_t batch = blockIdx.x / p.time, time = blockIdx.x % p.time;
  const T *x = (const T *)p.x + batch * p.batch_stride + time * p.time_stride + head * p.head_stride;
  T *out = (T *)p.out + ((int64_t)blockIdx.x * p.heads + head) * p.head_dim;
  if (unit >= turned) {
    const uint32_t at = 2 * p.pairs + (unit - turned) * N;
    Numbers<T, N>::load(x + at).store(out + at);
    return;
  }
  const uint32_t at = unit * N;
  const auto first = Numbers<T, N>::load(x + at), second = Numbers<T, N>::load(x + p.pairs + at);
  Numbers<T, N> to_first, to_second;
#pragma unroll
  for (int j = 0; j < N; j++) {
    const int64_t angle = (int64_t)time * p.pairs + at + j;
    const float cos = p.cos[angle], sin = p.direction * p.sin[angle];
    to_first.set(j, first.get(j) * cos - second.get(j) * sin);
    to_second.set(j, second.get(j) * cos + first.get(j) * sin);
  }
  to_first.store(out + at);
  to_second.store(out + p.pairs + at);
}

FOR_DTYPES(rope, turn, RopeParams, ROW_THREADS)
