// Many ops on a few numbers of each sample, in one call. native.py compiles and calls them.

#include "blocks.h"

namespace {

constexpr int64_t SAMPLES = 32;  // that are gone through together

// As chains.py numbers them.
enum Op : int32_t { ADD, SUB, MUL, DIV, MIN, MAX, EQ, NE, LT, LE, WHERE, SQRT, ABS, NEG, ROUND };
enum Type : int64_t { FLOAT32, FLOAT64, BOOL };

struct Step {
  int32_t op, a, b, c;
};

// A tensor without gaps: lines of numbers, each with one for every sample, or one for all of them.
struct Lines {
  int64_t type, count, batched;
};

template <typename F>
void each(double *out, F of) {
#pragma GCC ivdep
  for (int64_t i = 0; i < SAMPLES; i++) out[i] = of(i);
}

// Every op is rounded to float64; ROUND behind it makes it float32's, which for these ops is as if it had been rounded
// to float32 alone (Figueroa 1995, When is double rounding innocuous?).
void run(const Step &step, const double *values, double *out) {
  const double *a = values + step.a * SAMPLES, *b = values + step.b * SAMPLES, *c = values + step.c * SAMPLES;
  switch (step.op) {
    case ADD: return each(out, [=](int64_t i) { return a[i] + b[i]; });
    case SUB: return each(out, [=](int64_t i) { return a[i] - b[i]; });
    case MUL: return each(out, [=](int64_t i) { return a[i] * b[i]; });
    case DIV: return each(out, [=](int64_t i) { return a[i] / b[i]; });
    case MIN: return each(out, [=](int64_t i) { return a[i] < b[i] || a[i] != a[i] ? a[i] : b[i]; });
    case MAX: return each(out, [=](int64_t i) { return a[i] > b[i] || a[i] != a[i] ? a[i] : b[i]; });
    case EQ: return each(out, [=](int64_t i) { return double(a[i] == b[i]); });
    case NE: return each(out, [=](int64_t i) { return double(a[i] != b[i]); });
    case LT: return each(out, [=](int64_t i) { return double(a[i] < b[i]); });
    case LE: return each(out, [=](int64_t i) { return double(a[i] <= b[i]); });
    case WHERE: return each(out, [=](int64_t i) { return a[i] != 0 ? b[i] : c[i]; });
    case SQRT: return each(out, [=](int64_t i) { return std::sqrt(a[i]); });
    case ABS: return each(out, [=](int64_t i) { return std::fabs(a[i]); });
    case NEG: return each(out, [=](int64_t i) { return -a[i]; });
    case ROUND: return each(out, [=](int64_t i) { return double(float(a[i])); });
  }
}

// What is to be done with every line of some tensors: its numbers for samples from the first on, and how far apart these
// are.
template <typename F, typename Each>
void lines_of(const Lines &lines, int64_t address, int64_t samples, int64_t first, Each each) {
  F *numbers = reinterpret_cast<F *>(address);
  for (int64_t i = 0; i < lines.count; i++)
    each(numbers + (lines.batched ? i * samples + first : i), lines.batched);
}
template <typename Each>
void lines_of(const Lines *tensors, int64_t count, const int64_t *addresses, int64_t samples, int64_t first, Each each) {
  for (int64_t i = 0; i < count; i++) {
    if (tensors[i].type == FLOAT32) lines_of<float>(tensors[i], addresses[i], samples, first, each);
    if (tensors[i].type == FLOAT64) lines_of<double>(tensors[i], addresses[i], samples, first, each);
    if (tensors[i].type == BOOL) lines_of<bool>(tensors[i], addresses[i], samples, first, each);
  }
}

}  // namespace

// `sizes`: constants, tensors read, their lines, steps, tensors written. A value is known by its place: constants come
// first, then lines that are read, then the result of each step. `written`: the value of each line that is written.
extern "C" void chain(const int64_t *sizes, const double *constants, const int64_t *read, const int32_t *code,
                      const int64_t *write, const int64_t *written, int64_t samples, const int64_t *given,
                      const int64_t *out) {
  const int64_t constant_count = sizes[0], line_count = sizes[2], step_count = sizes[3];
  const Lines *read_lines = reinterpret_cast<const Lines *>(read), *write_lines = reinterpret_cast<const Lines *>(write);
  const Step *steps = reinterpret_cast<const Step *>(code);
  const Buffer<double> values((constant_count + line_count + step_count) * SAMPLES);
  for (int64_t i = 0; i < constant_count; i++) std::fill_n(values.get() + i * SAMPLES, SAMPLES, constants[i]);
  double *lines = values.get() + constant_count * SAMPLES, *results = lines + line_count * SAMPLES;
  std::fill_n(lines, line_count * SAMPLES, 0.0);
  for (int64_t first = 0; first < samples; first += SAMPLES) {
    const int64_t count = std::min(SAMPLES, samples - first);
    double *to = lines;
    lines_of(read_lines, sizes[1], given, samples, first, [&](const auto *from, int64_t apart) {
      for (int64_t i = 0; i < count; i++) to[i] = double(from[i * apart]);
      to += SAMPLES;
    });
    for (int64_t i = 0; i < step_count; i++) run(steps[i], values.get(), results + i * SAMPLES);
    const int64_t *at = written;
    lines_of(write_lines, sizes[4], out, samples, first, [&](auto *numbers, int64_t apart) {
      const double *from = values.get() + *at++ * SAMPLES;
      for (int64_t i = 0; i < count; i++) numbers[i * apart] = std::remove_reference_t<decltype(*numbers)>(from[i]);
    });
  }
}
