// Norms that form a product block by block and keep its sums alone. native.py compiles and calls them.

#include <limits>
#include <vector>

#include "amx.h"
#include "blocks.h"

namespace {

// native.py counts roundings by these.
constexpr int64_t SPAN = 128;       // products that are added up one after the other
constexpr int64_t LINES_ADDED = 4;  // lines of a strip that are added up before float64 takes over

constexpr int64_t PACKED_BYTES = 1 << 18;  // of a factor, some elements of all positions: what stays in the second cache
constexpr int64_t GRAM_BYTES = 1 << 23;    // of Gram matrices that a thread keeps: what is packed again for the others

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

// The same from an element on: where it begins in memory, and how the rest lies.
inline int64_t skip_elements(Layout &x, int64_t count) {
  if (!x.positions) return count * x.element;
  x.elements += count;
  return 0;
}

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

// Adds the squares of every packed vector.
template <typename F>
void add_squares(const F *packed, int64_t panels, int64_t depth, F *out) {
  constexpr int W = WIDTH<F>;
  for (int64_t panel = 0; panel < panels; panel++, out += W) {
    Lanes<F> squares[4] = {};
    for (int64_t k = 0; k < depth; k++, packed += W) squares[k % 4] += load(packed) * load(packed);
    store(out, load(out) + ((squares[0] + squares[1]) + (squares[2] + squares[3])));
  }
}

// At least the norms of vectors across the panels: one for every k.
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
// `skip(line)`: leading panels that a line does not need. `more`: added to what is there.
template <typename F, typename Skip>
void strip(const F *left, const F *right, int64_t begin, int64_t end, int64_t depth, int64_t first, int64_t n, Skip skip,
           bool more, F *out) {
  constexpr int W = WIDTH<F>;
  for (int64_t start = 0; start < depth; start += SPAN) {
    const int64_t span = std::min(SPAN, depth - start);
    for (int64_t line = begin; line < end; line += HIGH<F>) {
      const int64_t from = skip(line);
      const F *l = left + ((line / W) * depth + start) * W + line % W;
      const F *r = right + ((first + from) * depth + start) * W;
      product(n - from, l, r, depth * W, span, more || start > 0, out + line * PANELS * W + from * W);
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

// Lines [begin, end) of a Gram matrix, for panels [first, first + n). `upper`: of those on the diagonal and above it.
struct Block {
  int64_t begin, end, first, n;
  bool upper;

  template <int W>
  int64_t skip(int64_t line) const {
    return upper ? std::max<int64_t>(0, line / W - first) : 0;
  }
  template <int W>
  int64_t area() const {
    return panels_of(end - begin, W) * W * PANELS * W;
  }
};

// Blocks of the Gram matrices of several factors, side by side in memory.
template <typename F>
class Room {
 public:
  static constexpr int W = WIDTH<F>;

  // Of all blocks of a task, or of as many at a time as there is room for.
  Room(int64_t count, const std::vector<std::vector<Block>> &tasks) {
    for (const std::vector<Block> &blocks : tasks) {
      int64_t all = 0, largest = 0;
      for (const Block &block : blocks) all += block.area<W>(), largest = std::max(largest, block.area<W>());
      room = std::max(room, std::min(all, std::max(largest, GRAM_BYTES / (count * int64_t(sizeof(F))))));
    }
    at.reset(new Buffer<F>(room * count));
  }
  // Takes as many of the blocks as there is room for, in turn.
  int64_t take(const Block *blocks, int64_t many) {
    begins.clear();
    int64_t used = 0;
    for (int64_t i = 0; i < many && used + blocks[i].area<W>() <= room; used += blocks[i++].area<W>())
      begins.push_back(used - blocks[i].begin * PANELS * W);
    return int64_t(begins.size());
  }
  // out[line][PANELS * W], by lines of the whole matrix.
  F *of(int64_t factor, int64_t block) const { return at->get() + room * factor + begins[block]; }
  void clear(int64_t factor) { std::fill_n(at->get() + room * factor, room, F(0)); }

 private:
  int64_t room = 0;
  std::unique_ptr<Buffer<F>> at;
  std::vector<int64_t> begins;
};

// Of pairs of positions: sums of K A, |K| c c and |A| r r.
template <typename F>
struct Pairs {
  Sums<F> together, by_cols, by_rows;

  // Those of a block, with `times(t, s)` what a pair counts in each lane.
  template <typename Times>
  void add(const F *row_gram, const F *col_gram, const F *r, const F *c, const Block &block, Times times) {
    constexpr int W = WIDTH<F>;
    for (int64_t start = block.begin; start < block.end; start += LINES_ADDED) {
      Lanes<F> pairs{}, row_sums{}, col_sums{};
      for (int64_t t = start; t < std::min(block.end, start + LINES_ADDED); t++) {
        Lanes<F> row_sum{}, col_sum{};
        for (int64_t panel = block.skip<W>(t); panel < block.n; panel++) {
          const int64_t at = (t * PANELS + panel) * W, s = (block.first + panel) * W;
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

// Some elements of all positions of a factor, packed, and their products.
template <typename F, typename G>
class Packed {
 public:
  static constexpr int64_t TAIL = HIGH<F>;  // up to so many positions behind the last full panel are lines alone

  explicit Packed(int64_t length)
      : depth(SPAN * std::max<int64_t>(1, PACKED_BYTES / (panels_of(length, W) * W * SPAN * int64_t(sizeof(F))))),
        length(length), packed(panels_of(length, W) * W * depth) {}

  const int64_t depth;  // elements that there is room for

  // Where squares are given, those of the elements are added to them.
  void read(const G *from, const Layout &x, int64_t width, F *squares) {
    pack_positions(from, x, 0, length, width, packed.get());
    if (squares) add_squares(packed.get(), panels_of(length, W), width, squares);
  }
  void multiply(const Block &block, int64_t width, bool more, F *out) const {
    const auto skip = [&block](int64_t line) { return block.skip<W>(line); };
    strip(packed.get(), packed.get(), block.begin, block.end, width, block.first, block.n, skip, more, out);
  }

 private:
  static constexpr int W = WIDTH<F>;
  int64_t length;
  Buffer<F> packed;
};

#ifdef DPCOMPILE_AMX
// The same by tiles of bfloat16.
class Tiles {
 public:
  static constexpr int64_t TAIL = 0;

  explicit Tiles(int64_t length)
      : length(length), left(panels_of(length, SIDE) * NEAR * TILE), right(panels_of(length, SIDE) * NEAR * TILE),
        packed(SIDE * NEAR * STEP) {}

  const int64_t depth = NEAR * STEP;

  void read(const bfloat16 *from, const Layout &rest, int64_t width, float *squares) {
    const int64_t steps = panels_of(width, STEP);
    uint16_t *lefts = left.get(), *rights = right.get();
    for (int64_t first = 0; first < length; first += SIDE, lefts += steps * TILE, rights += steps * TILE) {
      const int64_t there = std::min(SIDE, length - first);
      if (rest.positions || rest.element != 1) {
        pack_positions(from, rest, first, there, width, packed.get());
        if (squares) add_squares(packed.get(), 1, width, squares + first);
        for (int64_t k = 0; k < steps * STEP; k++)
          for (int64_t t = 0; t < SIDE; t++)
            lefts[(k / STEP * SIDE + t) * STEP + k % STEP] = k < width ? bits_of(packed.get()[k * SIDE + t]) : 0;
      } else {
        for (int64_t t = 0; t < SIDE; t++) {
          const int64_t own = t < there ? width : 0;
          if (!own)
            for (int64_t step = 0; step < steps; step++) std::memset(lefts + (step * SIDE + t) * STEP, 0, BYTES);
          const auto *line = reinterpret_cast<const uint16_t *>(from + (first + t) * rest.position);
          const float square = copy_line(line, own, lefts + t * STEP);
          if (squares) squares[first + t] += square;
        }
      }
      turn(lefts, steps, rights);
    }
  }
  void multiply(const Block &block, int64_t width, bool more, float *out) const {
    const int64_t steps = panels_of(width, STEP), next = steps * TILE;
    for (int64_t line = block.begin; line < block.end; line += SIDE) {
      const int64_t from = block.skip<SIDE>(line);
      tile_product(block.n - from, left.get() + line / SIDE * next, right.get() + (block.first + from) * next, next, steps,
                   more, out + (line * PANELS + from) * SIDE);
    }
  }

 private:
  static uint16_t bits_of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    return uint16_t(wide >> 16);
  }

  const TileSetting setting;
  int64_t length;
  Buffer<uint16_t> left, right;
  Buffer<float> packed;
};
#endif

// What one thread has of the factors of a sample: norms of their positions, and blocks of their Gram matrices, to which
// products of some elements at a time are added.
template <typename F, typename G, typename Pieces>
class Grams {
 public:
  Grams(const Factor<G> *factors, int64_t count, int64_t length, const std::vector<std::vector<Block>> &tasks)
      : factors(factors), count(count), padded(panels_of(length, WIDTH<F>) * WIDTH<F>), pieces(length),
        room(count, tasks), norm(padded * count) {}

  const F *norms_of(int64_t i) const { return norm.get() + padded * i; }
  const F *gram_of(int64_t i, int64_t block) const { return room.of(i, block); }

  // The first of the blocks, as many as there is room for: how many. `norms`: those of the positions as well.
  int64_t form(int64_t sample, const Block *blocks, int64_t many, bool norms) {
    const int64_t taken = room.take(blocks, many);
    for (int64_t i = 0; i < count; i++) {
      const Factor<G> &x = factors[i];
      F *squares = norms ? norm.get() + padded * i : nullptr;
      if (norms) std::fill_n(squares, padded, F(0));
      if (x.width == 0) room.clear(i);
      for (int64_t start = 0; start < x.width; start += pieces.depth) {
        const int64_t width = std::min(pieces.depth, x.width - start);
        Layout rest = x.layout;
        const G *from = x.from + sample * x.layout.sample + skip_elements(rest, start);
        pieces.read(from, rest, width, squares);
        for (int64_t b = 0; b < taken; b++) pieces.multiply(blocks[b], width, start > 0, room.of(i, b));
      }
      if (norms)
        for (int64_t t = 0; t < padded; t++) squares[t] = x.slack.norm(squares[t]);
    }
    return taken;
  }

 private:
  const Factor<G> *factors;
  int64_t count, padded;  // positions in whole panels
  Pieces pieces;
  Room<F> room;
  Buffer<F> norm;
};

// Sums for pairs of factors, which are numbered: the Gram matrix of each is formed once.
template <typename F, typename G, typename Pieces>
void paired_by(const Factor<G> *factors, int64_t count, const int64_t *pairs, int64_t pair_count, int64_t samples,
               int64_t length, int threads, double *out) {
  constexpr int W = WIDTH<F>;
  const int64_t panels = panels_of(length, W);
  // A few positions behind the last full panel are lines for the panels before, and a strip for themselves alone.
  const bool few = panels > 1 && length % W > 0 && length % W <= Pieces::TAIL;
  const int64_t full = panels - few, wide = panels_of(full, PANELS), strips = wide + few;
  const int64_t parts = parts_of(samples, strips, threads), tasks = samples * parts;
  std::unique_ptr<double[]> partial(new double[tasks * pair_count * 4]());
  F diagonal[W][W];  // what a pair counts: twice above the diagonal
  for (int t = 0; t < W; t++)
    for (int s = 0; s < W; s++) diagonal[t][s] = s > t ? 2 : s == t ? 1 : 0;
  const auto upper = [&diagonal](int64_t t, int64_t s) { return t >= s ? load(diagonal[t % W]) : Lanes<F>{} + F(2); };
  const auto twice = [](int64_t, int64_t) { return Lanes<F>{} + F(2); };
  std::vector<std::vector<Block>> blocks(parts);
  for (int64_t at = 0; at < strips; at++) {
    std::vector<Block> &own = blocks[at % parts];
    const int64_t first = std::min(at * PANELS, full), last = at < wide ? full : panels;
    const int64_t n = std::min<int64_t>(PANELS, last - first), end = std::min((first + n) * W, length);
    own.push_back({at < wide ? 0 : first * W, end, first, n, true});
    if (few && at < wide) own.push_back({full * W, length, first, n, false});
  }
#pragma omp parallel num_threads(threads)
  {
    Grams<F, G, Pieces> grams(factors, count, length, blocks);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t sample = task / parts, part = task % parts;
      const std::vector<Block> &own = blocks[part];
      std::unique_ptr<Pairs<F>[]> sums(new Pairs<F>[pair_count]());
      for (size_t done = 0; done < own.size();) {
        const Block *next = own.data() + done;
        const int64_t formed = grams.form(sample, next, int64_t(own.size() - done), done == 0);
        for (int64_t i = 0; i < pair_count; i++) {
          const int64_t row = pairs[2 * i], col = pairs[2 * i + 1];
          for (int64_t b = 0; b < formed; b++) {
            const auto add = [&](auto times) {
              sums[i].add(grams.gram_of(row, b), grams.gram_of(col, b), grams.norms_of(row), grams.norms_of(col), next[b],
                          times);
            };
            if (next[b].upper)
              add(upper);
            else
              add(twice);
          }
        }
        done += size_t(formed);
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
      return paired_by<F, G, Tiles>(factors, count, pairs, pair_count, samples, length, threads, out);
#endif
  paired_by<F, G, Packed<F, G>>(factors, count, pairs, pair_count, samples, length, threads, out);
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
        strip(R.get(), C.get(), 0, high * W, z.length, first, n, skip, false, block.get());
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
        strip(R.get(), C.get(), 0, high * W, z.length, 0, panels_of(width, W), skip, false, block.get());
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
