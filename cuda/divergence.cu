// The divergence of a student from a teacher over all classes, and its gradients, from the logits of both heads.
//
// A block has a row. It reads the logits once, and once more for a gradient that needs the divergence.
#include "vectors.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int COLUMNS = 8;  // of a thread at a time

// p is the student's distribution, q the teacher's.
enum Kind {
  FORWARD,         // KL(q || p)
  REVERSE,         // KL(p || q)
  JENSEN_SHANNON,  // beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
};

struct SideParams {
  const float *logits;  // (rows, stride), scaled and capped
  const float *sums;    // (rows, class_tiles, 2), as `logits_sm90a` leaves them
  void *gradient;       // out: (rows, stride) of the products, zeros past the rows and the classes; or null
  float softcap;        // <= 0: none
  float logit_scale;
};

struct DivergenceParams {
  SideParams student, teacher;
  const float *weights;  // (rows) what the gradients are multiplied by, where there are any
  float *divergences;    // out: (rows)
  int64_t stride;        // a multiple of 8
  uint32_t rows;         // blocks past them write zeros
  uint32_t vocab, class_tiles;
  float beta;
};

// Sums over the block, in a fixed order; every thread gets them.
__device__ float block_sum(float x) {
  __shared__ float parts[WARPS];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < WARPS; i++) sum += parts[i];
  return sum;
}

__device__ MaxSum block_merge(MaxSum x) {
  __shared__ float2 parts[WARPS];
  for (int i = 16; i; i >>= 1)
    x.merge(__shfl_xor_sync(0xffffffff, x.max, i), __shfl_xor_sync(0xffffffff, x.sum, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = make_float2(x.max, x.sum);
  __syncthreads();
  MaxSum all;
  for (int i = 0; i < WARPS; i++) all.merge(parts[i].x, parts[i].y);
  return all;
}

// A row of one head.
struct Row {
  const float *from;
  float max, log_sum;  // lse in two parts
  float inverse_cap, scale;  // the former 0: none

  __device__ Row(const SideParams &p, const DivergenceParams &all, int64_t row)
      : from(p.logits + row * all.stride), inverse_cap(p.softcap > 0.f ? 1.f / p.softcap : 0.f), scale(p.logit_scale) {
    MaxSum sums;
    const float2 *of_tiles = (const float2 *)p.sums + row * all.class_tiles;
    for (uint32_t i = threadIdx.x; i < all.class_tiles; i += THREADS) sums.merge(of_tiles[i].x, of_tiles[i].y);
    sums = block_merge(sums);
    max = sums.max, log_sum = logf(sums.sum);
  }

  // -inf past the last class.
  __device__ __forceinline__ void logits(float (&z)[COLUMNS], int64_t first, uint32_t vocab) const {
    if (first + COLUMNS <= vocab) {
#pragma unroll
      for (int i = 0; i < COLUMNS; i += 4) {
        const float4 part = *reinterpret_cast<const float4 *>(from + first + i);
        z[i] = part.x, z[i + 1] = part.y, z[i + 2] = part.z, z[i + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) z[i] = first + i < vocab ? from[first + i] : -INFINITY;
    }
  }

  __device__ __forceinline__ float log_prob(float z) const { return (z - max) - log_sum; }

  // The derivative of the logit by its product.
  __device__ __forceinline__ float slope(float z) const {
    if (inverse_cap == 0.f) return scale;
    const float part = z * inverse_cap;
    return scale * fmaf(-part, part, 1.f);
  }
};

// p x, and 0 where p is, whatever x.
__device__ __forceinline__ float times(float p, float x) { return p == 0.f ? p : p * x; }

// log p - log m and log q - log m of a class, from s = log p and t = log q. Exactly 0 where both are the same.
__device__ __forceinline__ float2 from_mixture(float s, float t, float beta) {
  const float above = s - t;
  // A NaN is in both.
  const float above_s = above >= 0.f ? 0.f : -above, above_t = above <= 0.f ? 0.f : above;
  const float other_share = above > 0.f ? beta : 1.f - beta;
  const float base = -logf(1.f + other_share * (fast_exp(-(above_s + above_t)) - 1.f));
  return make_float2(base - above_s, base - above_t);
}

template <int KIND> struct Terms {
  float beta;

  // A class's part of the sums: of the student's from the other or the mixture, and of the teacher's.
  __device__ __forceinline__ float2 sums(float s, float t) const {
    if (KIND == FORWARD) return make_float2(0.f, times(fast_exp(t), t - s));
    if (KIND == REVERSE) return make_float2(times(fast_exp(s), s - t), 0.f);
    const float2 from = from_mixture(s, t, beta);
    return make_float2(times(fast_exp(s), from.x), times(fast_exp(t), from.y));
  }
  __device__ float divergence(float2 sum) const {
    if (KIND == FORWARD) return sum.y;
    if (KIND == REVERSE) return sum.x;
    return beta * sum.y + (1.f - beta) * sum.x;
  }
  // The gradient of the divergence with respect to a logit.
  __device__ __forceinline__ float of_student(float s, float t, float2 sum) const {
    if (KIND == FORWARD) return fast_exp(s) - fast_exp(t);
    if (KIND == REVERSE) return times(fast_exp(s), s - t - sum.x);
    return times((1.f - beta) * fast_exp(s), from_mixture(s, t, beta).x - sum.x);
  }
  __device__ __forceinline__ float of_teacher(float s, float t, float2 sum) const {
    if (KIND == FORWARD) return times(fast_exp(t), t - s - sum.y);
    if (KIND == REVERSE) return fast_exp(t) - fast_exp(s);
    return times(beta * fast_exp(t), from_mixture(s, t, beta).y - sum.y);
  }
  // Whether that needs no sums.
  static constexpr bool STUDENT_AT_ONCE = KIND == FORWARD, TEACHER_AT_ONCE = KIND == REVERSE;
};

template <typename T> __device__ void write_zeros(const SideParams &p, int64_t row, int64_t stride) {
  if (!p.gradient) return;
  Numbers<T, COLUMNS> zeros;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) zeros.set(i, 0.f);
  for (int64_t first = threadIdx.x * COLUMNS; first < stride; first += THREADS * COLUMNS)
    zeros.store((T *)p.gradient + row * stride + first);
}

template <typename T, int KIND> __device__ void divergence(const DivergenceParams &p) {
  const int64_t row = blockIdx.x, step = THREADS * COLUMNS, mine = threadIdx.x * COLUMNS;
  if (row >= p.rows) {
    write_zeros<T>(p.student, row, p.stride);
    write_zeros<T>(p.teacher, row, p.stride);
    return;
  }
  const Row student(p.student, p, row), teacher(p.teacher, p, row);
  const Terms<KIND> terms{p.beta};
  const float weight = p.weights ? p.weights[row] : 0.f;
  float s[COLUMNS], t[COLUMNS];
  float2 sum = make_float2(0.f, 0.f);
  // Adds to the sums of the thread and writes gradients, of the classes from `first` on.
  auto go = [&](int64_t first, bool add, bool write_student, bool write_teacher) {
    student.logits(s, first, p.vocab);
    teacher.logits(t, first, p.vocab);
    Numbers<T, COLUMNS> to_student, to_teacher;
    float2 part = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const float log_p = student.log_prob(s[i]), log_q = teacher.log_prob(t[i]);
      const bool exists = first + i < p.vocab;
      if (add && exists) {
        const float2 of_class = terms.sums(log_p, log_q);
        part.x += of_class.x, part.y += of_class.y;
      }
      if (write_student)
        to_student.set(i, exists ? weight * student.slope(s[i]) * terms.of_student(log_p, log_q, sum) : 0.f);
      if (write_teacher)
        to_teacher.set(i, exists ? weight * teacher.slope(t[i]) * terms.of_teacher(log_p, log_q, sum) : 0.f);
    }
    const int64_t at = row * p.stride + first;
    if (write_student) to_student.store((T *)p.student.gradient + at);
    if (write_teacher) to_teacher.store((T *)p.teacher.gradient + at);
    if (add) sum.x += part.x, sum.y += part.y;
  };
  const bool student_now = terms.STUDENT_AT_ONCE && p.student.gradient;
  const bool teacher_now = terms.TEACHER_AT_ONCE && p.teacher.gradient;
  for (int64_t first = mine; first < p.stride; first += step) go(first, true, student_now, teacher_now);
  sum.x = block_sum(sum.x), sum.y = block_sum(sum.y);
  if (threadIdx.x == 0) p.divergences[row] = terms.divergence(sum);
  const bool student_later = p.student.gradient && !student_now, teacher_later = p.teacher.gradient && !teacher_now;
  if (student_later || teacher_later)
    // Backwards: what was read last is still in the cache.
    for (int64_t first = (p.stride - 1) / step * step + mine; first >= 0; first -= step)
      if (first < p.stride) go(first, false, student_later, teacher_later);
}

#define DIVERGENCE(NAME, KIND)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_bf16(const DivergenceParams p) { \
    divergence<__nv_bfloat16, KIND>(p);                                                              \
  }
DIVERGENCE(forward_divergence, FORWARD)
DIVERGENCE(reverse_divergence, REVERSE)
DIVERGENCE(mixture_divergence, JENSEN_SHANNON)

static_assert(THREADS == 512, "the host mirrors it");
