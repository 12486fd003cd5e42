// What a step does with gradients: their norm, clipping, AdamW.
#include "vectors.cuh"

constexpr int THREADS = 256;

// Where a gradient's numbers are summed and scaled. Blocks share the numbers in turns of THREADS * N.
struct GradientParams {
  const void *gradient;
  float *partials;      // sum of squares: a number a block
  const float *factor;  // scaling
  void *out;            // scaling: factor * gradient
  uint64_t count;
  uint32_t aligned, unused;
};

template <typename T, int N, class Each> __device__ __forceinline__ void each(const GradientParams &p, Each f) {
  const uint64_t step = (uint64_t)gridDim.x * THREADS * N;
  for (uint64_t i = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * N; i < p.count; i += step)
    f(Numbers<T, N>::load((const T *)p.gradient + i), i);
}

template <typename T, int N> __device__ void squares(const GradientParams &p) {
  __shared__ float parts[THREADS / 32];
  float sum = 0.f;
  each<T, N>(p, [&](const Numbers<T, N> &gradient, uint64_t) {
#pragma unroll
    for (int j = 0; j < N; j++) sum += gradient.get(j) * gradient.get(j);
  });
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < THREADS / 32; i++) sum += parts[i];
    p.partials[blockIdx.x] = sum;
  }
}

template <typename T, int N> __device__ void scale(const GradientParams &p) {
  const float factor = *p.factor;
  each<T, N>(p, [&](Numbers<T, N> gradient, uint64_t i) {
#pragma unroll
    for (int j = 0; j < N; j++) gradient.set(j, gradient.get(j) * factor);
    gradient.store((T *)p.out + i);
  });
}

FOR_DTYPES(sum_of_squares, squares, GradientParams, THREADS)
FOR_DTYPES(scale_gradient, scale, GradientParams, THREADS)

struct NormParams {
  const float *partials;
  float *norm;    // out
  float *factor;  // out: what makes the norm at most max_norm, 1 where it is or where it is not finite
  uint64_t count;
  float max_norm;
  uint32_t unused;
};

extern "C" __global__ void __launch_bounds__(ONE_BLOCK) gradient_norm(const NormParams p) {
  double sum = 0;
  for (uint64_t i = threadIdx.x; i < p.count; i += ONE_BLOCK) sum += p.partials[i];
  sum = block_reduce<ONE_BLOCK>(sum, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) {
    const float norm = (float)sqrt(sum);
    *p.norm = norm;
    *p.factor = norm > p.max_norm && isfinite(norm) ? p.max_norm / norm : 1.f;
  }
}

struct AdamWParams {
  const void *gradient;
  void *variable;                // the weights, or where there is a master its rounded copy
  float *master;                 // null for f32
  float *first_moment, *second_moment;
  uint64_t count;
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float keep;                    // 1 - lr * weight_decay
  float rate;                    // lr / (1 - beta1^t)
  float second_scale;            // 1 / (1 - beta2^t)
  float eps;
  uint32_t aligned, unused;
};

// m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  w <- keep w - rate m / (sqrt(second_scale v) + eps)
template <typename T, int N> __device__ void adamw(const AdamWParams &p) {
  const uint64_t i = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * N;
  if (i >= p.count) return;
  const auto gradient = Numbers<T, N>::load((const T *)p.gradient + i);
  auto variable = Numbers<T, N>::load((const T *)p.variable + i);
  // f32 numbers in accesses of at most 16 bytes.
  constexpr int F = N < 4 ? N : 4;
#pragma unroll
  for (int part = 0; part < N; part += F) {
    auto m = Numbers<float, F>::load(p.first_moment + i + part), v = Numbers<float, F>::load(p.second_moment + i + part);
    Numbers<float, F> w;
    if (p.master) w = Numbers<float, F>::load(p.master + i + part);
#pragma unroll
    for (int j = 0; j < F; j++) {
      const float g = gradient.get(part + j);
      m.value[j] = p.beta1 * m.value[j] + p.one_minus_beta1 * g;
      v.value[j] = p.beta2 * v.value[j] + p.one_minus_beta2 * g * g;
      const float before = p.master ? w.value[j] : variable.get(part + j);
      w.value[j] = p.keep * before - p.rate * m.value[j] / (sqrtf(p.second_scale * v.value[j]) + p.eps);
      variable.set(part + j, w.value[j]);
    }
    m.store(p.first_moment + i + part);
    v.store(p.second_moment + i + part);
    if (p.master) w.store(p.master + i + part);
  }
  variable.store((T *)p.variable + i);
}

FOR_DTYPES(adamw, adamw, AdamWParams, THREADS)
