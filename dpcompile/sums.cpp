// Sums of products over positions, in one pass that writes down no product, and what group norm makes of them.
// native.py compiles and calls them.

#include "blocks.h"

namespace {

constexpr int64_t RUN = 64;  // terms that one number takes up before it is added to the others
constexpr int64_t ALONE = 32768;  // terms up to which one thread is done before another has woken up

// Products x g, or (x - shift) scale g with a shift and a scale for every pair of an outer index and a position, either
// of which may be left out: of tensors [outer, before, kept, behind] summed over before and behind.
template <typename F>
struct Factors {
  int64_t outer, before, kept, behind;
  const F *x, *g, *shift, *scale;
};

template <typename F>
F shift_of(const Factors<F> &z, int64_t position) {
  return z.shift ? z.shift[position] : F(0);
}

template <typename F>
F scale_of(const Factors<F> &z, int64_t position) {
  return z.scale ? z.scale[position] : F(1);
}

// Adds the products of N positions to columns [from, from + count).
template <int N, typename F>
void add_positions(const Factors<F> &z, int64_t position, int64_t from, int64_t count, F *sums) {
  const F *x = z.x + position * z.kept + from, *g = z.g + position * z.kept + from;
  F shift[N], scale[N];
  for (int n = 0; n < N; n++) shift[n] = shift_of(z, position + n), scale[n] = scale_of(z, position + n);
#pragma GCC ivdep
  for (int64_t k = 0; k < count; k++) {
    F sum = 0;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum += (x[n * z.kept + k] - shift[n]) * scale[n] * g[n * z.kept + k];
    sums[k] += sum;
  }
}

// One after the other in memory are the numbers that are kept: columns [from, to) of out[kept].
template <typename F>
void along_kept(const Factors<F> &z, int64_t outer, int64_t from, int64_t to, F *run, F *out) {
  const int64_t count = to - from;
  std::fill_n(out + from, count, F(0));
  for (int64_t start = 0; start < z.before; start += RUN) {
    const int64_t end = std::min(z.before, start + RUN);
    std::fill_n(run, count, F(0));
    int64_t t = start;
    for (; t + 4 <= end; t += 4) add_positions<4>(z, outer * z.before + t, from, count, run);
    for (; t < end; t++) add_positions<1>(z, outer * z.before + t, from, count, run);
    for (int64_t k = 0; k < count; k++) out[from + k] += run[k];
  }
}

// One after the other in memory are numbers that are added up.
template <typename F>
F along_sum(const Factors<F> &z, int64_t outer, int64_t kept) {
  constexpr int W = WIDTH<F>;
  F total = 0;
  for (int64_t t = 0; t < z.before; t++) {
    const int64_t position = outer * z.before + t, at = (position * z.kept + kept) * z.behind;
    const F *x = z.x + at, *g = z.g + at;
    const F shift = shift_of(z, position), scale = scale_of(z, position);
    for (int64_t start = 0; start < z.behind; start += 4 * W * RUN) {
      const int64_t end = std::min(z.behind, start + 4 * W * RUN);
      int64_t s = start;
      F sum = 0;
      if (end - s >= W) {
        Lanes<F> runs[4] = {};
        for (; s + 4 * W <= end; s += 4 * W)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) runs[i] += (load(x + s + i * W) - shift) * scale * load(g + s + i * W);
        for (; s + W <= end; s += W) runs[0] += (load(x + s) - shift) * scale * load(g + s);
        const Lanes<F> sums = (runs[0] + runs[1]) + (runs[2] + runs[3]);
        for (int i = 0; i < W; i++) sum += sums[i];
      }
      for (; s < end; s++) sum += (x[s] - shift) * scale * g[s];
      total += sum;
    }
  }
  return total;
}

// N numbers that are added up lie in a row: columns [from, to) of out[kept], several rows at a time.
template <int N, typename F>
void along_short(const Factors<F> &z, int64_t outer, int64_t from, int64_t to, F *out) {
  std::fill_n(out + from, to - from, F(0));
  for (int64_t position = outer * z.before; position < (outer + 1) * z.before; position++) {
    const F shift = shift_of(z, position), scale = scale_of(z, position);
    const F *x = z.x + position * z.kept * N, *g = z.g + position * z.kept * N;
#pragma GCC ivdep
    for (int64_t k = from; k < to; k++) {
      F sum = 0;
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum += (x[k * N + n] - shift) * scale * g[k * N + n];
      out[k] += sum;
    }
  }
}

// Columns [from, to) of out[kept].
template <typename F>
void along_rows(const Factors<F> &z, int64_t outer, int64_t from, int64_t to, F *out) {
  switch (z.behind) {
    case 2: return along_short<2>(z, outer, from, to, out);
    case 4: return along_short<4>(z, outer, from, to, out);
    case 8: return along_short<8>(z, outer, from, to, out);
    case 9: return along_short<9>(z, outer, from, to, out);
    case 16: return along_short<16>(z, outer, from, to, out);
    default:
      for (int64_t kept = from; kept < to; kept++) out[kept] = along_sum(z, outer, kept);
  }
}

template <typename F>
void products(Factors<F> z, int threads, F *out) {
  if (z.before == 1 && !z.shift && !z.scale) z.kept *= z.outer, z.outer = 1;
  if (z.outer * z.before * z.kept * z.behind <= ALONE) threads = 1;
  const int64_t least = z.behind > 1 ? 1 : 4 * WIDTH<F>;  // columns that are worth a task
  const int64_t parts = std::min(panels_of(4 * threads, z.outer), panels_of(z.kept, least));
  const int64_t size = panels_of(z.kept, parts);
  const int64_t tasks = z.outer * parts, beside = std::max<int64_t>(1, tasks / (4 * threads));
#pragma omp parallel num_threads(threads)
  {
    const Buffer<F> run(size);
#pragma omp for schedule(dynamic, beside)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t outer = task / parts, from = task % parts * size, to = std::min(z.kept, from + size);
      F *own = out + outer * z.kept;
      if (z.behind == 1 && from < to)
        along_kept(z, outer, from, to, run.get(), own);
      else
        along_rows(z, outer, from, to, own);
    }
  }
}

// ------------------------------------------------------------------ backward of group norm

// Images [samples, channels, size] and what their forward kept of them: [samples, groups].
template <typename F>
struct Grouped {
  int64_t samples, channels, size, groups;
  const F *g, *x, *mean, *rstd, *weight;
};

// Sums of x g and of g, of which all x are those of one channel.
template <typename F>
void channel_sums(const F *x, const F *g, int64_t count, F &products, F &sums) {
  constexpr int W = WIDTH<F>;
  products = sums = 0;
  for (int64_t start = 0; start < count; start += 4 * W * RUN) {
    const int64_t end = std::min(count, start + 4 * W * RUN);
    int64_t s = start;
    if (end - s >= W) {
      Lanes<F> both[4] = {}, own[4] = {};
      for (; s + 4 * W <= end; s += 4 * W)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const Lanes<F> grad = load(g + s + i * W);
          both[i] += load(x + s + i * W) * grad, own[i] += grad;
        }
      for (; s + W <= end; s += W) both[0] += load(x + s) * load(g + s), own[0] += load(g + s);
      const Lanes<F> product = (both[0] + both[1]) + (both[2] + both[3]), sum = (own[0] + own[1]) + (own[2] + own[3]);
      for (int i = 0; i < W; i++) products += product[i], sums += sum[i];
    }
    for (; s < end; s++) products += x[s] * g[s], sums += g[s];
  }
}

// The input's gradient, and for every channel of a sample the sums of x g and of g. With y = (x - mean) rstd weight and n
// numbers in a group, of which G and P are the sums of weight g and of weight g x,
//   dx = rstd weight g + a x + b,  a = rstd^3 (G mean - P) / n,  b = - a mean - rstd G / n.
// The numbers of a group are still in the cache when they are read again.
template <typename F>
void group_norm_backward(const Grouped<F> &z, int threads, F *out, F *products, F *sums) {
  const int64_t each = z.channels / z.groups, tasks = z.samples * z.groups;
  if (tasks * each * z.size <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t first = task % z.groups * each, channel = task * each, at = channel * z.size;
    const F mean = z.mean[task], rstd = z.rstd[task];
    double by_g = 0, by_x = 0;
    for (int64_t c = 0; c < each; c++) {
      channel_sums(z.x + at + c * z.size, z.g + at + c * z.size, z.size, products[channel + c], sums[channel + c]);
      const double weight = z.weight ? double(z.weight[first + c]) : 1;
      by_g += weight * double(sums[channel + c]), by_x += weight * double(products[channel + c]);
    }
    const double n = double(each * z.size), cube = double(rstd) * double(rstd) * double(rstd);
    const double slope = cube * (by_g * double(mean) - by_x) / n;
    const F a = F(slope), b = F(-slope * double(mean) - double(rstd) * by_g / n);
    for (int64_t c = 0; c < each; c++) {
      const F scale = z.weight ? rstd * z.weight[first + c] : rstd;
      const F *x = z.x + at + c * z.size, *g = z.g + at + c * z.size;
      F *to = out + at + c * z.size;
#pragma GCC ivdep
      for (int64_t s = 0; s < z.size; s++) to[s] = scale * g[s] + (a * x[s] + b);
    }
  }
}

}  // namespace

#define PRODUCTS(name, F)                                                                                          \
  extern "C" void products_##name(const int64_t *sizes, const void *x, const void *g, const void *shift,          \
                                  const void *scale, int threads, void *out) {                                    \
    const auto of = [](const void *at) { return static_cast<const F *>(at); };                                    \
    products<F>({sizes[0], sizes[1], sizes[2], sizes[3], of(x), of(g), of(shift), of(scale)}, threads,             \
                static_cast<F *>(out));                                                                            \
  }
PRODUCTS(float32, float)
PRODUCTS(float64, double)

#define GROUP_NORM_BACKWARD(name, F)                                                                                \
  extern "C" void group_norm_backward_##name(const int64_t *sizes, const void *g, const void *x, const void *mean, \
                                             const void *rstd, const void *weight, int threads, void *out,         \
                                             void *products, void *sums) {                                         \
    const auto of = [](const void *at) { return static_cast<const F *>(at); };                                      \
    const auto to = [](void *at) { return static_cast<F *>(at); };                                                  \
    group_norm_backward<F>({sizes[0], sizes[1], sizes[2], sizes[3], of(g), of(x), of(mean), of(rstd), of(weight)},  \
                           threads, to(out), to(products), to(sums));                                               \
  }
GROUP_NORM_BACKWARD(float32, float)
GROUP_NORM_BACKWARD(float64, double)
