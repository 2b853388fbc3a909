// Norms that form a product block by block and keep its sums alone. native.py compiles and calls them.

#include <limits>

#include "amx.h"
#include "blocks.h"

namespace {

// native.py counts roundings by these.
constexpr int64_t SPAN = 128;       // products that are added up one after the other
constexpr int64_t LINES_ADDED = 4;  // lines of a strip that are added up before float64 takes over

constexpr int64_t PACKED_BYTES = 1 << 24;  // factors of a sample that a thread keeps packed

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// Sums of lanes in float64.
template <typename F>
struct Sums {
  double lanes[WIDTH<F>] = {};
  void add(Lanes<F> more) {
    for (int i = 0; i < WIDTH<F>; i++) lanes[i] += double(more[i]);
  }
  double total() const {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// Where the numbers of a factor are: at sample * i + position * t + element * k, or where tables say so for t and k.
struct Layout {
  int64_t sample, position, element;
  const int64_t *positions = nullptr, *elements = nullptr;
};

// Vectors of numbers that tables find: one vector in each lane.
template <typename F, typename G>
void gather(const G *from, int64_t count, const int64_t *vectors, int64_t depth, const int64_t *elements, F *packed) {
  constexpr int W = WIDTH<F>;
  for (int64_t first = 0; first < count; first += W) {
    const int lanes = int(std::min<int64_t>(W, count - first));
    int64_t at[W];
    for (int i = 0; i < W; i++) at[i] = vectors[first + std::min(i, lanes - 1)];
    const bool beside = lanes == W && at[W - 1] - at[0] == W - 1;  // in a table that ascends
    for (int64_t k = 0; k < depth; k++, packed += W) {
      const G *base = from + elements[k];
      if (beside) {
        store(packed, widened<F>(base + at[0]));
      } else if (lanes == W && k + W <= depth && elements[k + W - 1] - elements[k] == W - 1) {
        Lanes<F> lines[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) lines[i] = widened<F>(base + at[i]);
        transpose<F>(lines);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(packed + i * W, lines[i]);
        k += W - 1, packed += (W - 1) * W;
      } else {
        for (int i = 0; i < W; i++) packed[i] = F(base[at[i]]);
        for (int i = lanes; i < W; i++) packed[i] = F(0);
      }
    }
  }
}

// Positions of a sample from the first on, each a vector of its elements.
template <typename F, typename G>
void pack_positions(const G *from, const Layout &x, int64_t first, int64_t length, int64_t width, F *packed) {
  if (x.positions)
    gather(from, length, x.positions + first, width, x.elements, packed);
  else
    pack(from + first * x.position, length, x.position, width, x.element, packed);
}

// Elements from the first on, each a vector of its positions.
template <typename F, typename G>
void pack_elements(const G *from, const Layout &x, int64_t length, int64_t first, int64_t width, F *packed) {
  if (x.positions)
    gather(from, width, x.elements + first, length, x.positions, packed);
  else
    pack(from + first * x.element, width, x.element, length, x.position, packed);
}

struct Slack {
  double relative, least;
  template <typename F>
  F norm(F square) const {
    return with(std::sqrt(square));
  }
  template <typename F>
  F with(F norm) const {
    return norm * F(relative) + F(least);
  }
};

// Of every packed vector, at least its norm.
template <typename F>
void norms(const F *packed, int64_t panels, int64_t depth, const Slack &slack, F *out) {
  constexpr int W = WIDTH<F>;
  for (int64_t panel = 0; panel < panels; panel++, out += W) {
    Lanes<F> squares[4] = {};
    for (int64_t k = 0; k < depth; k++, packed += W) squares[k % 4] += load(packed) * load(packed);
    const Lanes<F> sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    for (int i = 0; i < W; i++) out[i] = slack.norm<F>(sum[i]);
  }
}

// The same of vectors across the panels: one for every k.
template <typename F>
void norms_across(const F *packed, int64_t panels, int64_t depth, const Slack &slack, F *out) {
  constexpr int W = WIDTH<F>;
  for (int64_t k = 0; k < depth; k++) {
    Lanes<F> squares{};
    for (int64_t panel = 0; panel < panels; panel++) {
      const Lanes<F> values = load(packed + (panel * depth + k) * W);
      squares += values * values;
    }
    F sum = 0;
    for (int i = 0; i < W; i++) sum += squares[i];
    out[k] = slack.norm(sum);
  }
}

// Lines [begin, end) of a product, for panels [first, first + n): out[line][PANELS * WIDTH], SPAN terms at a time.
// `skip(line)`: leading panels that a line does not need.
template <typename F, typename Skip>
void strip(const F *left, const F *right, int64_t begin, int64_t end, int64_t depth, int64_t first, int64_t n, Skip skip,
           F *out) {
  constexpr int W = WIDTH<F>;
  for (int64_t start = 0; start < depth; start += SPAN) {
    const int64_t span = std::min(SPAN, depth - start);
    for (int64_t line = begin; line < end; line += HIGH<F>) {
      const int64_t from = skip(line);
      const F *l = left + ((line / W) * depth + start) * W + line % W;
      const F *r = right + ((first + from) * depth + start) * W;
      product(n - from, l, r, depth * W, span, start > 0, out + line * PANELS * W + from * W);
    }
  }
}

// Parts that the work for one sample is cut into, so that all threads have some.
int64_t parts_of(int64_t samples, int64_t strips, int threads) {
  if (samples % threads == 0 || samples >= 4 * threads) return 1;
  return std::max<int64_t>(1, std::min(strips, panels_of(4 * threads, samples)));
}

struct Sizes {
  int64_t samples, length, p, d;
  Layout rows, cols;
  Slack row_norm, col_norm;
};

// ------------------------------------------------------------------ flash ghost norm

// [samples, length, width].
template <typename G>
struct Factor {
  const G *from;
  int64_t width;
  Layout layout;
  Slack slack;
};

// Where each of several factors is packed, or all of them in turn where together they need too many bytes.
template <typename G>
class Places {
 public:
  // `bytes` for an element of all positions; elements are padded to whole steps.
  Places(int64_t count, const Factor<G> *factors, int64_t bytes, int64_t step = 1) : starts(new int64_t[count + 1]()) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t padded = panels_of(factors[i].width, step) * step;
      starts[i + 1] = starts[i] + padded, widest = std::max(widest, padded);
    }
    keep = bytes * starts[count] <= PACKED_BYTES;
    width = keep ? starts[count] : widest;
  }
  int64_t before(int64_t i) const { return keep ? starts[i] : 0; }

  int64_t widest = 0, width = 0;  // elements of the widest; that there is room for
  bool keep = true;

 private:
  std::unique_ptr<int64_t[]> starts;
};

// Of pairs of positions: sums of K A, |K| c c and |A| r r.
template <typename F>
struct Pairs {
  Sums<F> together, by_cols, by_rows;

  // Lines [begin, end) of a strip, with `times(t, s)` what a pair counts in each lane.
  template <typename Skip, typename Times>
  void add(const F *row_gram, const F *col_gram, const F *r, const F *c, int64_t begin, int64_t end, int64_t first,
           int64_t n, Skip skip, Times times) {
    constexpr int W = WIDTH<F>;
    for (int64_t start = begin; start < end; start += LINES_ADDED) {
      Lanes<F> pairs{}, row_sums{}, col_sums{};
      for (int64_t t = start; t < std::min(end, start + LINES_ADDED); t++) {
        Lanes<F> row_sum{}, col_sum{};
        for (int64_t panel = skip(t); panel < n; panel++) {
          const int64_t at = (t * PANELS + panel) * W, s = (first + panel) * W;
          const Lanes<F> counted = times(t, s);
          const Lanes<F> K = load(row_gram + at) * counted, A = load(col_gram + at);
          pairs += K * A;
          col_sum += absolute<F>(K) * load(c + s);
          row_sum += absolute<F>(A) * counted * load(r + s);
        }
        col_sums += col_sum * c[t];
        row_sums += row_sum * r[t];
      }
      together.add(pairs), by_cols.add(col_sums), by_rows.add(row_sums);
    }
  }
};

// What one thread has of the factors of a sample: packed, with their norms, and strips of their Gram matrices. Many or
// long factors are packed again for every strip, so that not all of them are there at a time.
template <typename F, typename G>
class Grams {
 public:
  static constexpr int64_t TAIL = HIGH<F>;  // up to so many positions behind the last full panel are lines alone

  Grams(const Factor<G> *factors, int64_t count, int64_t length)
      : factors(factors), count(count), length(length), panels(panels_of(length, W)),
        places(count, factors, panels * W * int64_t(sizeof(F))), packed(panels * W * places.width),
        norm(panels * W * count), gram(area() * count) {}

  const F *norms_of(int64_t i) const { return norm.get() + panels * W * i; }
  const F *gram_of(int64_t i) const { return gram.get() + area() * i; }

  void begin(int64_t sample) {
    for (int64_t i = 0; i < count; i++) {
      read(i, sample);
      norms(place(i), panels, factors[i].width, factors[i].slack, norm.get() + panels * W * i);
    }
  }

  // Lines [begin, end) of a strip of each.
  template <typename Skip>
  void form(int64_t sample, int64_t begin, int64_t end, int64_t first, int64_t n, Skip skip) {
    for (int64_t i = 0; i < count; i++) {
      if (!places.keep) read(i, sample);
      F *out = gram.get() + area() * i;
      if (factors[i].width == 0) std::fill_n(out, area(), F(0));
      strip(place(i), place(i), begin, end, factors[i].width, first, n, skip, out);
    }
  }

 private:
  static constexpr int W = WIDTH<F>;
  int64_t area() const { return panels * W * PANELS * W; }
  F *place(int64_t i) const { return packed.get() + panels * W * places.before(i); }
  void read(int64_t i, int64_t sample) {
    const Factor<G> &x = factors[i];
    pack_positions(x.from + sample * x.layout.sample, x.layout, 0, length, x.width, place(i));
  }

  const Factor<G> *factors;
  int64_t count, length, panels;
  Places<G> places;
  Buffer<F> packed, norm, gram;
};

#ifdef DPCOMPILE_AMX
// The same by tiles of bfloat16.
class TiledGrams {
 public:
  static constexpr int64_t TAIL = 0;

  TiledGrams(const Factor<bfloat16> *factors, int64_t count, int64_t length)
      : factors(factors), count(count), length(length), panels(panels_of(length, SIDE)),
        places(count, factors, panels * SIDE * 2 * int64_t(sizeof(bfloat16)), STEP),
        left(panels * SIDE * places.width), right(panels * SIDE * places.width), packed(SIDE * places.widest),
        norm(panels * SIDE * count), gram(area() * count) {}

  const float *norms_of(int64_t i) const { return norm.get() + panels * SIDE * i; }
  const float *gram_of(int64_t i) const { return gram.get() + area() * i; }

  void begin(int64_t sample) {
    for (int64_t i = 0; i < count; i++) read(i, sample);
  }

  template <typename Skip>
  void form(int64_t sample, int64_t begin, int64_t end, int64_t first, int64_t n, Skip skip) {
    for (int64_t i = 0; i < count; i++) {
      if (!places.keep) read(i, sample);
      float *out = gram.get() + area() * i;
      if (factors[i].width == 0) std::fill_n(out, area(), 0.0f);
      const int64_t steps = panels_of(factors[i].width, STEP), next = steps * TILE;
      for (int64_t start = 0; start < steps; start += NEAR)
        for (int64_t line = begin; line < end; line += SIDE) {
          const int64_t from = skip(line);
          const uint16_t *l = place(left, i) + (line / SIDE) * next + start * TILE;
          const uint16_t *r = place(right, i) + (first + from) * next + start * TILE;
          tile_product(n - from, l, r, next, std::min(NEAR, steps - start), start > 0,
                       out + (line * PANELS + from) * SIDE);
        }
    }
  }

 private:
  int64_t area() const { return panels * SIDE * PANELS * SIDE; }
  uint16_t *place(const Buffer<uint16_t> &x, int64_t i) const { return x.get() + panels * SIDE * places.before(i); }

  void read(int64_t i, int64_t sample) {
    const Factor<bfloat16> &x = factors[i];
    const bfloat16 *from = x.from + sample * x.layout.sample;
    const int64_t steps = panels_of(x.width, STEP);
    uint16_t *lefts = place(left, i), *rights = place(right, i);
    float *norms_at = norm.get() + panels * SIDE * i;
    for (int64_t first = 0; first < length; first += SIDE, lefts += steps * TILE, rights += steps * TILE) {
      const int64_t some = std::min(SIDE, length - first);
      if (x.layout.positions || x.layout.element != 1) {
        pack_positions(from, x.layout, first, some, x.width, packed.get());
        norms(packed.get(), 1, x.width, x.slack, norms_at + first);
        for (int64_t k = 0; k < steps * STEP; k++)
          for (int64_t t = 0; t < SIDE; t++)
            lefts[(k / STEP * SIDE + t) * STEP + k % STEP] = k < x.width ? bits_of(packed.get()[k * SIDE + t]) : 0;
      } else {
        for (int64_t t = 0; t < SIDE; t++) {
          const int64_t width = t < some ? x.width : 0;
          if (!width)
            for (int64_t step = 0; step < steps; step++) std::memset(lefts + (step * SIDE + t) * STEP, 0, BYTES);
          const auto *line = reinterpret_cast<const uint16_t *>(from + (first + t) * x.layout.position);
          norms_at[first + t] = x.slack.with(copy_line(line, width, lefts + t * STEP));
        }
      }
      turn(lefts, steps, rights);
    }
  }
  static uint16_t bits_of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    return uint16_t(wide >> 16);
  }

  const TileSetting setting;
  const Factor<bfloat16> *factors;
  int64_t count, length, panels;
  Places<bfloat16> places;
  Buffer<uint16_t> left, right;
  Buffer<float> packed, norm, gram;
};
#endif

// Sums for pairs of factors, which are numbered: the Gram matrix of each is formed once.
template <typename F, typename G, typename Grams>
void paired_by(const Factor<G> *factors, int64_t count, const int64_t *pairs, int64_t pair_count, int64_t samples,
               int64_t length, int threads, double *out) {
  constexpr int W = WIDTH<F>;
  const int64_t panels = panels_of(length, W);
  // A few positions behind the last full panel are lines for the panels before, and a strip for themselves alone.
  const bool few = panels > 1 && length % W > 0 && length % W <= Grams::TAIL;
  const int64_t full = panels - few, wide = panels_of(full, PANELS), strips = wide + few;
  const int64_t parts = parts_of(samples, strips, threads), tasks = samples * parts;
  std::unique_ptr<double[]> partial(new double[tasks * pair_count * 4]());
  F diagonal[W][W];  // what a pair counts: twice above the diagonal
  for (int t = 0; t < W; t++)
    for (int s = 0; s < W; s++) diagonal[t][s] = s > t ? 2 : s == t ? 1 : 0;
  const auto upper = [&diagonal](int64_t t, int64_t s) { return t >= s ? load(diagonal[t % W]) : Lanes<F>{} + F(2); };
  const auto twice = [](int64_t, int64_t) { return Lanes<F>{} + F(2); };
  const auto none = [](int64_t) { return int64_t(0); };
#pragma omp parallel num_threads(threads)
  {
    Grams grams(factors, count, length);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t sample = task / parts, part = task % parts;
      grams.begin(sample);
      std::unique_ptr<Pairs<F>[]> sums(new Pairs<F>[pair_count]());
      const auto add = [&](int64_t begin, int64_t end, int64_t first, int64_t n, auto skip, auto times) {
        for (int64_t i = 0; i < pair_count; i++) {
          const int64_t row = pairs[2 * i], col = pairs[2 * i + 1];
          sums[i].add(grams.gram_of(row), grams.gram_of(col), grams.norms_of(row), grams.norms_of(col), begin, end,
                      first, n, skip, times);
        }
      };
      for (int64_t strip_at = part; strip_at < strips; strip_at += parts) {
        const int64_t first = std::min(strip_at * PANELS, full), last = strip_at < wide ? full : panels;
        const int64_t n = std::min<int64_t>(PANELS, last - first);
        const int64_t begin = strip_at < wide ? 0 : first * W, end = std::min((first + n) * W, length);
        const auto skip = [first](int64_t line) { return std::max<int64_t>(0, line / W - first); };
        grams.form(sample, begin, end, first, n, skip);
        add(begin, end, first, n, skip, upper);
        if (few && strip_at < wide) {
          grams.form(sample, full * W, length, first, n, none);
          add(full * W, length, first, n, none, twice);
        }
      }
      for (int64_t i = 0; i < pair_count; i++) {
        const F *r = grams.norms_of(pairs[2 * i]), *c = grams.norms_of(pairs[2 * i + 1]);
        double *found = partial.get() + (task * pair_count + i) * 4;
        found[0] = sums[i].together.total(), found[1] = sums[i].by_cols.total(), found[2] = sums[i].by_rows.total();
        if (part == 0)
          for (int64_t t = 0; t < length; t++) {
            // More than products that underflow could lose: in a line, before its factor and behind it.
            const double least = length * double(std::numeric_limits<F>::min());
            found[1] += 1e-30 * c[t] + 2 * least, found[2] += 1e-30 * r[t] + 2 * least;
            found[3] += double(r[t]) * c[t];
          }
      }
    }
  }
  for (int64_t task = 0; task < tasks; task++)
    for (int64_t i = 0; i < pair_count * 4; i++)
      out[i * samples + task / parts] += partial[task * pair_count * 4 + i];
}

template <typename F, typename G>
void paired(const Factor<G> *factors, int64_t count, const int64_t *pairs, int64_t pair_count, int64_t samples,
            int64_t length, int threads, double *out) {
#ifdef DPCOMPILE_AMX
  if constexpr (std::is_same_v<F, float> && std::is_same_v<G, bfloat16>)
    if (tiles_allowed())
      return paired_by<F, G, TiledGrams>(factors, count, pairs, pair_count, samples, length, threads, out);
#endif
  paired_by<F, G, Grams<F, G>>(factors, count, pairs, pair_count, samples, length, threads, out);
}

// ------------------------------------------------------------------ explicit norm

template <typename F, typename G>
void squared(const G *rows, const G *cols, const Sizes &z, int threads, double *out) {
  constexpr int W = WIDTH<F>;
  const int64_t high = panels_of(z.p, W), panels = panels_of(z.d, W), strips = panels_of(panels, PANELS);
  const int64_t parts = parts_of(z.samples, strips, threads), tasks = z.samples * parts;
  std::unique_ptr<double[]> partial(new double[tasks * 2]());
#pragma omp parallel num_threads(threads)
  {
    const Buffer<F> R(high * W * z.length), C(panels * W * z.length), block(high * W * PANELS * W);
    const Buffer<F> r(z.length), c(z.length);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t sample = task / parts, part = task % parts;
      pack_elements(rows + sample * z.rows.sample, z.rows, z.length, 0, z.p, R.get());
      pack_elements(cols + sample * z.cols.sample, z.cols, z.length, 0, z.d, C.get());
      Sums<F> squares;
      for (int64_t strip_at = part; strip_at < strips; strip_at += parts) {
        const int64_t first = strip_at * PANELS, n = std::min<int64_t>(PANELS, panels - first);
        const auto skip = [](int64_t) { return 0; };
        strip(R.get(), C.get(), 0, high * W, z.length, first, n, skip, block.get());
        for (int64_t line = 0; line < z.p; line++) {
          Lanes<F> sum{};
          for (int64_t panel = 0; panel < n; panel++) {
            const Lanes<F> value = load(block.get() + (line * PANELS + panel) * W);
            sum += value * value;
          }
          squares.add(sum);
        }
      }
      partial[task * 2] = squares.total();
      if (part == 0) {
        norms_across(R.get(), high, z.length, z.row_norm, r.get());
        norms_across(C.get(), panels, z.length, z.col_norm, c.get());
        for (int64_t t = 0; t < z.length; t++) partial[task * 2 + 1] += double(r.get()[t]) * c.get()[t];
      }
    }
  }
  for (int64_t task = 0; task < tasks; task++)
    for (int64_t i = 0; i < 2; i++) out[i * z.samples + task / parts] += partial[task * 2 + i];
}

// ------------------------------------------------------------------ explicit gradients

// out[sample][p][d]. The columns of a strip are packed when its turn has come, so that they stay in cache.
template <typename F, typename G>
void gradients(const G *rows, const G *cols, const Sizes &z, int threads, F *out) {
  constexpr int W = WIDTH<F>;
  const int64_t high = panels_of(z.p, W), strips = panels_of(panels_of(z.d, W), PANELS);
  const int64_t parts = parts_of(z.samples, strips, threads);
#pragma omp parallel num_threads(threads)
  {
    const Buffer<F> R(high * W * z.length), C(PANELS * W * z.length), block(high * W * PANELS * W);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < z.samples * parts; task++) {
      const int64_t sample = task / parts;
      pack_elements(rows + sample * z.rows.sample, z.rows, z.length, 0, z.p, R.get());
      for (int64_t strip_at = task % parts; strip_at < strips; strip_at += parts) {
        const int64_t first = strip_at * PANELS * W, width = std::min<int64_t>(PANELS * W, z.d - first);
        pack_elements(cols + sample * z.cols.sample, z.cols, z.length, first, width, C.get());
        const auto skip = [](int64_t) { return 0; };
        strip(R.get(), C.get(), 0, high * W, z.length, 0, panels_of(width, W), skip, block.get());
        for (int64_t line = 0; line < z.p; line++)
          std::memcpy(out + (sample * z.p + line) * z.d + first, block.get() + line * PANELS * W, width * sizeof(F));
      }
    }
  }
}

Layout layout_of(const int64_t *q) {
  const auto table = [](int64_t address) { return reinterpret_cast<const int64_t *>(address); };
  return {q[0], q[1], q[2], table(q[3]), table(q[4])};
}

Sizes sizes_of(const int64_t *q, const double *slack) {
  return {q[0], q[1], q[2], q[3], layout_of(q + 4), layout_of(q + 9), {slack[0], slack[1]}, {slack[2], slack[3]}};
}

// Of the sizes: samples, length, factors and pairs; a width and a layout for each factor; two factors for each pair.
template <typename F, typename G>
void paired(const void *const *from, const int64_t *sizes, const double *slack, int threads, double *out) {
  const int64_t count = sizes[2], *q = sizes + 4;
  std::unique_ptr<Factor<G>[]> factors(new Factor<G>[count]);
  for (int64_t i = 0; i < count; i++, q += 6, slack += 2)
    factors[i] = {static_cast<const G *>(from[i]), q[0], layout_of(q + 1), {slack[0], slack[1]}};
  paired<F>(factors.get(), count, q, sizes[3], sizes[0], sizes[1], threads, out);
}

}  // namespace

// NAME_FACTOR_TOTAL: what factors are of, and what products are added up in.
#define KERNEL(name, factor, G, total, F, result)                                                              \
  extern "C" void name##_##factor##_##total(const void *rows, const void *cols, const int64_t *sizes,          \
                                            const double *slack, int threads, result *out) {                   \
    name<F>(static_cast<const G *>(rows), static_cast<const G *>(cols), sizes_of(sizes, slack), threads, out); \
  }
#define PAIRED(name, factor, G, total, F, result)                                               \
  extern "C" void name##_##factor##_##total(const void *const *factors, const int64_t *sizes,  \
                                            const double *slack, int threads, result *out) {   \
    name<F, G>(factors, sizes, slack, threads, out);                                            \
  }
#define NORMS(name, KERNEL)                                 \
  KERNEL(name, float32, float, float32, float, double)      \
  KERNEL(name, float32, float, float64, double, double)     \
  KERNEL(name, float64, double, float64, double, double)    \
  KERNEL(name, bfloat16, bfloat16, float32, float, double)  \
  KERNEL(name, bfloat16, bfloat16, float64, double, double)
NORMS(squared, KERNEL)
NORMS(paired, PAIRED)
KERNEL(gradients, float32, float, float32, float, float)
KERNEL(gradients, float64, double, float64, double, double)
