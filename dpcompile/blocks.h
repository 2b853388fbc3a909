// Products of matrices in blocks of registers, for the kernels of tiles.cpp and recurrent.cpp.
//
// A block has HIGH rows by up to PANELS registers. Factors are packed first, each in panels of as many vectors of
// numbers as a register has lanes: packed[panel][k][lane], with zeros in lanes beyond the last.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, LINES = 8;  // of a register; rows of a block, so that its sums fit into the registers there are
#elif defined(__AVX__)
constexpr int BYTES = 32, LINES = 4;
#else
constexpr int BYTES = 16, LINES = 4;
#endif
constexpr int PANELS = 3;

template <typename F>
struct Vector {
  typedef F type __attribute__((vector_size(BYTES)));
};
template <typename F>
using Lanes = typename Vector<F>::type;
template <typename F>
constexpr int WIDTH = BYTES / int(sizeof(F));
template <typename F>
constexpr int HIGH = std::min(LINES, WIDTH<F>);

template <typename F>
Lanes<F> load(const F *from) {
  Lanes<F> lanes;
  std::memcpy(&lanes, from, BYTES);
  return lanes;
}

// The same of another type.
template <typename F, typename G>
Lanes<F> widened(const G *from) {
  if constexpr (std::is_same_v<F, G>) return load(from);
  F values[WIDTH<F>];
  for (int i = 0; i < WIDTH<F>; i++) values[i] = F(from[i]);
  return load(values);
}

template <typename F>
void store(F *to, Lanes<F> lanes) {
  std::memcpy(to, &lanes, BYTES);
}

template <typename F>
Lanes<F> absolute(Lanes<F> lanes) {
  return lanes < 0 ? -lanes : lanes;
}

template <typename F>
class Buffer {
 public:
  explicit Buffer(int64_t count) : at(static_cast<F *>(::operator new(count * sizeof(F), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(at, std::align_val_t(64)); }
  Buffer(const Buffer &) = delete;
  F *get() const { return at; }

 private:
  F *at;
};

// ------------------------------------------------------------------ packing

// Rows of WIDTH vectors to columns, by WIDTH = 2^n registers that are interleaved n times.
template <typename F>
void transpose(Lanes<F> (&lines)[WIDTH<F>]) {
  constexpr int W = WIDTH<F>;
  using Index = std::conditional_t<sizeof(F) == 4, int32_t, int64_t>;
  typedef Index Places __attribute__((vector_size(BYTES)));
  Places low, high;
  for (int i = 0; i < W; i++) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Lanes<F> mixed[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      mixed[2 * i] = __builtin_shuffle(lines[i], lines[i + W / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(lines[i], lines[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) lines[i] = mixed[i];
  }
}

// Vectors of `depth` numbers, one in each lane.
template <typename F, typename G>
void pack(const G *from, int64_t count, int64_t stride, int64_t depth, int64_t stride_k, F *packed) {
  constexpr int W = WIDTH<F>;
  for (int64_t first = 0; first < count; first += W) {
    const int lanes = int(std::min<int64_t>(W, count - first));
    const G *base = from + first * stride;
    int64_t k = 0;
    if (lanes == W && stride == 1) {
      for (; k < depth; k++, packed += W)
        store(packed, widened<F>(base + k * stride_k));
    } else if (lanes == W && stride_k == 1) {
      for (; k + W <= depth; k += W, packed += W * W) {
        Lanes<F> lines[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) lines[i] = widened<F>(base + i * stride + k);
        transpose<F>(lines);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(packed + i * W, lines[i]);
      }
    }
    for (; k < depth; k++, packed += W)
      for (int i = 0; i < W; i++) packed[i] = i < lanes ? F(base[i * stride + k * stride_k]) : F(0);
  }
}

// ------------------------------------------------------------------ products

// HIGH by N * WIDTH sums of `depth` products, added to `out` or written there.
template <typename F, int N>
void product(const F *left, const F *right, int64_t next, int64_t depth, bool add, F *out) {
  constexpr int W = WIDTH<F>, M = HIGH<F>;
  Lanes<F> sums[M][N] = {};
  for (int64_t k = 0; k < depth; k++) {
    Lanes<F> r[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) r[n] = load(right + n * next + k * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Lanes<F> l = left[k * W + m] - Lanes<F>{};
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[m][n] += l * r[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      F *to = out + (m * PANELS + n) * W;
      store(to, add ? load(to) + sums[m][n] : sums[m][n]);
    }
}

// The same for as many panels as there are.
template <typename F>
void product(int64_t n, const F *left, const F *right, int64_t next, int64_t depth, bool add, F *out) {
  static_assert(PANELS == 3);
  if (n == 3) product<F, 3>(left, right, next, depth, add, out);
  if (n == 2) product<F, 2>(left, right, next, depth, add, out);
  if (n == 1) product<F, 1>(left, right, next, depth, add, out);
}

int64_t panels_of(int64_t count, int64_t width) { return (count + width - 1) / width; }

}  // namespace
