// Largest numbers under windows of images, with where they are. native.py compiles and calls them.

#include <limits>
#include <vector>

#include "blocks.h"

namespace {

struct Windows {
  int64_t planes, high, wide, rows, columns;  // images, and their windows
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

template <typename F>
using Place = std::conditional_t<sizeof(F) == 4, int32_t, int64_t>;  // as wide as a number, so that lanes fit

// A column of the kernel, for windows [begin, end): that of window i is at row[phase + stride * (i + shift)].
struct Tap {
  int64_t phase, shift, begin, end;
};

std::vector<Tap> taps_of(const Windows &z) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < z.kernel[1]; k++) {
    const int64_t stride = z.stride[1], at = k * z.dilation[1] - z.padding[1];  // in the row, of the first window
    const int64_t phase = (at % stride + stride) % stride, left = z.wide - at;
    taps.push_back({phase, (at - phase) / stride, at < 0 ? panels_of(-at, stride) : 0,
                    left <= 0 ? 0 : std::min(z.columns, panels_of(left, stride))});
  }
  return taps;
}

// Every stride-th number of a row, for each phase: where windows read side by side.
template <typename F>
void part(const F *row, int64_t count, int64_t stride, int64_t each, F *phases) {
  if (stride == 2) {
    F *even = phases, *odd = phases + each;
#pragma GCC ivdep
    for (int64_t i = 0; i < count / 2; i++) even[i] = row[2 * i], odd[i] = row[2 * i + 1];
    if (count % 2) even[count / 2] = row[count - 1];
    return;
  }
  for (int64_t phase = 0; phase < stride; phase++)
    for (int64_t i = 0; phase + i * stride < count; i++) phases[phase * each + i] = row[phase + i * stride];
}

template <typename F>
void take_larger(const F *values, const Tap &tap, Place<F> place, Place<F> stride, F *best, Place<F> *at) {
#pragma GCC ivdep
  for (int64_t i = tap.begin; i < tap.end; i++) {
    const F value = values[i];
    const bool larger = (value > best[i]) | (value != value) | (at[i] < 0);  // NaN is the largest; else the first of equals
    best[i] = larger ? value : best[i];
    at[i] = larger ? Place<F>(place + stride * Place<F>(i)) : at[i];
  }
}

// Of narrow images, as many planes at a time as a register has lanes.
template <typename F>
class Narrow {
 public:
  explicit Narrow(const Windows &z)
      : z(z), windows(z.rows * z.columns), packed(z.high * z.wide * W), best(rounded() * W), places(rounded() * W) {}

  void run(const F *images, int64_t count, F *out, int64_t *at) {
    pack(images, count, z.high * z.wide, z.high * z.wide, 1, packed.get());
    for (int64_t row = 0, window = 0; row < z.rows; row++)
      for (int64_t column = 0; column < z.columns; column++, window++) take_largest(row, column, window);
    for (int64_t first = 0; first < windows; first += W) {
      const int64_t some = std::min<int64_t>(W, windows - first);
      Lanes<F> lines[W], found[W];
      for (int i = 0; i < W; i++) lines[i] = load(best.get() + (first + i) * W), found[i] = load(places.get() + (first + i) * W);
      transpose<F>(lines), transpose<F>(found);
      for (int64_t plane = 0; plane < count; plane++) {
        Place<F> own[W];
        std::memcpy(own, &found[plane], BYTES);
        std::memcpy(out + plane * windows + first, &lines[plane], some * sizeof(F));
        for (int64_t i = 0; i < some; i++) at[plane * windows + first + i] = own[i];
      }
    }
  }

 private:
  static constexpr int W = WIDTH<F>;
  typedef Place<F> Marks __attribute__((vector_size(BYTES)));
  int64_t rounded() const { return panels_of(windows, W) * W; }

  void take_largest(int64_t row, int64_t column, int64_t window) {
    Lanes<F> largest = Lanes<F>{} - std::numeric_limits<F>::infinity();
    Marks place = Marks{} - 1;
    for (int64_t k = 0; k < z.kernel[0]; k++)
      for (int64_t l = 0; l < z.kernel[1]; l++) {
        const int64_t y = row * z.stride[0] - z.padding[0] + k * z.dilation[0];
        const int64_t x = column * z.stride[1] - z.padding[1] + l * z.dilation[1];
        if (y < 0 || y >= z.high || x < 0 || x >= z.wide) continue;
        const Lanes<F> values = load(packed.get() + (y * z.wide + x) * W);
        const Marks larger = (values > largest) | (values != values) | (place < 0);  // as in take_larger
        largest = larger ? values : largest;
        place = larger ? Marks{} + Place<F>(y * z.wide + x) : place;
      }
    store(best.get() + window * W, largest);
    std::memcpy(places.get() + window * W, &place, BYTES);
  }

  const Windows z;
  int64_t windows;
  Buffer<F> packed, best, places;
};

constexpr int64_t NARROW_PLANE = 4096;  // numbers of a plane that is kept with others

template <typename F>
void max_pool_narrow(const F *images, const Windows &z, int threads, F *out, int64_t *at) {
  constexpr int W = WIDTH<F>;
  const int64_t size = z.high * z.wide, windows = z.rows * z.columns;
#pragma omp parallel num_threads(threads)
  {
    Narrow<F> narrow(z);
#pragma omp for
    for (int64_t first = 0; first < z.planes; first += W)
      narrow.run(images + first * size, std::min<int64_t>(W, z.planes - first), out + first * windows, at + first * windows);
  }
}

template <typename F>
void max_pool(const F *images, const Windows &z, int threads, F *out, int64_t *at) {
  if (z.columns < WIDTH<F> && z.high * z.wide <= NARROW_PLANE) return max_pool_narrow(images, z, threads, out, at);
  const int64_t stride = z.stride[1], each = panels_of(z.wide, stride);
  const auto taps = taps_of(z);
#pragma omp parallel num_threads(threads)
  {
    const Buffer<F> phases(stride * each);
    const Buffer<Place<F>> places(z.columns);
#pragma omp for
    for (int64_t line = 0; line < z.planes * z.rows; line++) {
      const F *plane = images + line / z.rows * z.high * z.wide;
      F *best = out + line * z.columns;
      std::fill_n(best, z.columns, -std::numeric_limits<F>::infinity());
      std::fill_n(places.get(), z.columns, Place<F>(-1));
      for (int64_t k = 0; k < z.kernel[0]; k++) {
        const int64_t y = line % z.rows * z.stride[0] - z.padding[0] + k * z.dilation[0];
        if (y < 0 || y >= z.high) continue;
        const F *row = plane + y * z.wide;
        if (stride > 1) part(row, z.wide, stride, each, phases.get());
        for (const Tap &tap : taps) {
          const F *values = stride > 1 ? phases.get() + tap.phase * each + tap.shift : row + tap.shift;
          const auto place = Place<F>(y * z.wide + tap.phase + stride * tap.shift);
          take_larger(values, tap, place, Place<F>(stride), best, places.get());
        }
      }
      std::copy_n(places.get(), z.columns, at + line * z.columns);
    }
  }
}

}  // namespace

#define MAX_POOL(name, F)                                                                                          \
  extern "C" void max_pool_##name(const void *images, const int64_t *q, int threads, void *out, int64_t *at) {     \
    const Windows z{q[0], q[1], q[2], q[3], q[4], {q[5], q[6]}, {q[7], q[8]}, {q[9], q[10]}, {q[11], q[12]}};      \
    max_pool(static_cast<const F *>(images), z, threads, static_cast<F *>(out), at);                               \
  }
MAX_POOL(float32, float)
MAX_POOL(float64, double)
