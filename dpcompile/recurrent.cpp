// The steps of recurrent layers (recurrent.py), each thread with samples of its own. native.py compiles and calls them.
//
// A group has as many samples as a register has lanes. What goes into its product with the weight is packed as the left
// factor, step by step; the weight as the right one, once for all steps.

#include "blocks.h"

namespace {

template <typename F>
Lanes<F> broadcast(F value) {
  return value - Lanes<F>{};
}

// e^x. Of float32 to about an ulp: 2^n e^r with |r| <= ln(2) / 2, by the polynomial of Cephes' expf.
template <typename F>
Lanes<F> exponential(Lanes<F> x) {
  if constexpr (std::is_same_v<F, double>) {
    for (int i = 0; i < WIDTH<F>; i++) x[i] = std::exp(x[i]);
    return x;
  } else {
    typedef int32_t Bits __attribute__((vector_size(BYTES)));
    x = x > 88.f ? broadcast(88.f) : x;
    x = x < -87.f ? broadcast(-87.f) : x;
    const Lanes<F> n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // rounded: near 2^23 there are no fractions
    const Lanes<F> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes<F> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Bits bits = (__builtin_convertvector(n, Bits) + 127) << 23;
    Lanes<F> power;
    std::memcpy(&power, &bits, BYTES);
    return p * power;
  }
}

template <typename F>
Lanes<F> sigmoid(Lanes<F> x) {
  return F(1) / (F(1) + exponential<F>(-x));
}

// 1 - 2 / (1 + e^2|x|), and near zero x + x^3 p(x^2), as Cephes' tanhf.
template <typename F>
Lanes<F> hyperbolic(Lanes<F> x) {
  if constexpr (std::is_same_v<F, double>) {
    for (int i = 0; i < WIDTH<F>; i++) x[i] = std::tanh(x[i]);
    return x;
  } else {
    const Lanes<F> size = absolute<F>(x), z = x * x;
    const Lanes<F> far = 1.f - 2.f / (1.f + exponential<F>(size + size));
    Lanes<F> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return size < 0.625f ? p * z * x + x : x < 0 ? -far : far;
  }
}

// Some features of one sample at one step: up to a register of them.
struct Place {
  int64_t sample, step, feature;
  int count;
  Place before() const { return {sample, step - 1, feature, count}; }
};

// [B, T, features], with features side by side.
template <typename F>
struct Steps {
  F *data;
  int64_t sample, step;

  F *at(const Place &here, int64_t block = 0) const {
    return data + here.sample * sample + here.step * step + block + here.feature;
  }
  Lanes<F> get(const Place &here, int64_t block = 0) const {
    if (here.count == WIDTH<F>) return load(at(here, block));
    Lanes<F> values{};
    std::memcpy(&values, at(here, block), here.count * sizeof(F));
    return values;
  }
  void put(const Place &here, Lanes<F> values, int64_t block = 0) const {
    std::memcpy(at(here, block), &values, here.count * sizeof(F));
  }
};

// What the state adds at a step: left^T weight, for as many samples as a multiple of HIGH.
template <typename F>
class Product {
 public:
  Product(const F *weight, int64_t samples, int64_t depth, int64_t columns)
      : weight(weight), depth(depth), width(panels_of(columns, WIDTH<F>) * WIDTH<F>), left(depth * WIDTH<F>),
        sums(samples * width) {
    std::fill_n(left.get(), depth * WIDTH<F>, F(0));
    std::fill_n(sums.get(), samples * width, F(0));
  }

  void multiply(int64_t samples) {
    constexpr int W = WIDTH<F>, M = HIGH<F>;
    F block[M * PANELS * W];
    for (int64_t first = 0; first < width / W; first += PANELS) {
      const int64_t n = std::min<int64_t>(PANELS, width / W - first);
      for (int64_t line = 0; line < samples; line += M) {
        product(n, left.get() + line, weight + first * depth * W, depth * W, depth, false, block);
        for (int m = 0; m < M; m++)
          std::memcpy(sums.get() + (line + m) * width + first * W, block + m * PANELS * W, n * W * sizeof(F));
      }
    }
  }

  // A row of the sums, as if it were that of all steps.
  Lanes<F> get(int64_t line, const Place &here, int64_t block = 0) const {
    return Steps<F>{sums.get() + line * width, 0, 0}.get({0, 0, here.feature, here.count}, block);
  }

  void keep(int64_t line, const Place &here, Lanes<F> values, int64_t block = 0) {
    F *to = left.get() + (block + here.feature) * WIDTH<F> + line;
    for (int i = 0; i < here.count; i++) to[i * WIDTH<F>] = values[i];
  }

 private:
  const F *weight;
  int64_t depth, width;
  Buffer<F> left, sums;
};

struct Sizes {
  int64_t samples, steps, width;
};

// Samples of a group: a register's, or those of a block where threads would be left without any.
template <typename F>
int64_t group_of(const Sizes &z, int threads) {
  return panels_of(z.samples, WIDTH<F>) < threads ? HIGH<F> : WIDTH<F>;
}

// Every place of a step, for a group of samples that begins with `first`.
template <typename F, typename Visit>
void places(const Sizes &z, int64_t first, int64_t samples, int64_t step, Visit visit) {
  for (int64_t line = 0; line < samples; line++)
    for (int64_t j = 0; j < z.width; j += WIDTH<F>)
      visit(line, Place{first + line, step, j, int(std::min<int64_t>(WIDTH<F>, z.width - j))});
}

// Steps one after the other: `cell` gives the next state. `weight`: what makes the gates, [gates, width].
template <typename F, typename Cell>
void forward(const Sizes &z, const F *weight, int64_t gates, const F *h0, int threads, Cell cell) {
  constexpr int W = WIDTH<F>;
  const Buffer<F> packed(panels_of(gates, W) * W * z.width);
  pack(weight, gates, z.width, z.width, 1, packed.get());
  const int64_t most = group_of<F>(z, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t first = 0; first < z.samples; first += most) {
    const int64_t samples = std::min(most, z.samples - first);
    Product<F> product(packed.get(), most, z.width, gates);
    const Steps<F> start{const_cast<F *>(h0), z.width, 0};
    places<F>(z, first, samples, 0, [&](int64_t line, Place here) { product.keep(line, here, start.get(here)); });
    for (int64_t t = 0; t < z.steps; t++) {
      product.multiply(samples);
      places<F>(z, first, samples, t,
                [&](int64_t line, Place here) { product.keep(line, here, cell(product, line, here)); });
    }
  }
}

// Steps from the last to the first: `cell` gets what flows back into a state, and keeps the gradients of gates.
// `finish` gets what flows into the state before the first.
template <typename F, typename Cell, typename Finish>
void backward(const Sizes &z, const F *weight, int64_t gates, int threads, Cell cell, Finish finish) {
  constexpr int W = WIDTH<F>;
  const Buffer<F> packed(panels_of(z.width, W) * W * gates);
  pack(weight, z.width, 1, gates, z.width, packed.get());
  const int64_t most = group_of<F>(z, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t first = 0; first < z.samples; first += most) {
    const int64_t samples = std::min(most, z.samples - first);
    Product<F> product(packed.get(), most, gates, z.width);
    for (int64_t t = z.steps - 1; t >= 0; t--) {
      places<F>(z, first, samples, t,
                [&](int64_t line, Place here) { cell(product, line, here, product.get(line, here)); });
      product.multiply(samples);
    }
    places<F>(z, first, samples, 0, [&](int64_t line, Place here) { finish(here, product.get(line, here)); });
  }
}

// ------------------------------------------------------------------ cells

// gates: i, f, g, o; acts: i, f, o, g. There may be no bias.
template <typename F>
void lstm(const Sizes &z, const F *weight, const F *h0, const F *c0, Steps<F> gates, Steps<F> bias, Steps<F> acts,
          Steps<F> h, Steps<F> c, int threads) {
  const int64_t H = z.width;
  const Steps<F> start{const_cast<F *>(c0), H, 0};
  forward(z, weight, 4 * H, h0, threads, [=](Product<F> &sums, int64_t line, Place here) {
    const auto gate = [&](int64_t n) {
      const Lanes<F> entered = gates.get(here, n * H) + sums.get(line, here, n * H);
      return bias.data ? entered + bias.get(here, n * H) : entered;
    };
    const Lanes<F> i = sigmoid<F>(gate(0)), f = sigmoid<F>(gate(1)), g = hyperbolic<F>(gate(2)), o = sigmoid<F>(gate(3));
    const Lanes<F> cell = f * (here.step ? c.get(here.before()) : start.get(here)) + i * g;
    const Lanes<F> state = o * hyperbolic<F>(cell);
    acts.put(here, i), acts.put(here, f, H), acts.put(here, o, 2 * H), acts.put(here, g, 3 * H);
    c.put(here, cell), h.put(here, state);
    return state;
  });
}

// grad: of i, f, g, o. flow_c ends as the gradient of c0. There may be no gradient of c.
template <typename F>
void lstm_backward(const Sizes &z, const F *weight, const F *c0, Steps<F> grad_h, Steps<F> grad_c, Steps<F> c,
                   Steps<F> acts, Steps<F> grad, Steps<F> flow_h, Steps<F> flow_c, int threads) {
  const int64_t H = z.width;
  const Steps<F> start{const_cast<F *>(c0), H, 0};
  const auto cell = [=](Product<F> &sums, int64_t line, Place here, Lanes<F> carried) {
    const Lanes<F> i = acts.get(here), f = acts.get(here, H), o = acts.get(here, 2 * H), g = acts.get(here, 3 * H);
    const Lanes<F> before = here.step ? c.get(here.before()) : start.get(here), narrowed = hyperbolic<F>(c.get(here));
    const Lanes<F> to_h = grad_h.get(here) + carried;
    Lanes<F> flow = flow_c.get(here) + to_h * o * (1 - narrowed * narrowed);
    if (grad_c.data) flow += grad_c.get(here);
    const Lanes<F> of[] = {flow * g * (i - i * i), flow * before * (f - f * f), flow * i * (1 - g * g),
                           to_h * narrowed * (o - o * o)};
    for (int64_t n = 0; n < 4; n++) grad.put(here, of[n], n * H), sums.keep(line, here, of[n], n * H);
    flow_c.put(here, flow * f);
  };
  backward(z, weight, 4 * H, threads, cell, [=](Place here, Lanes<F> carried) { flow_h.put(here, carried); });
}

// acts: r, z, what the state adds to n, and n. The first three begin as what inputs and biases make of them, of the
// third the bias alone.
template <typename F>
void gru(const Sizes &z, const F *weight, const F *h0, Steps<F> entered, Steps<F> acts, Steps<F> h, int threads) {
  const int64_t H = z.width;
  const Steps<F> start{const_cast<F *>(h0), H, 0};
  forward(z, weight, 3 * H, h0, threads, [=](Product<F> &sums, int64_t line, Place here) {
    const auto gate = [&](int64_t n) { return acts.get(here, n * H) + sums.get(line, here, n * H); };
    const Lanes<F> reset = sigmoid<F>(gate(0)), update = sigmoid<F>(gate(1)), hidden = gate(2);
    const Lanes<F> fresh = hyperbolic<F>(entered.get(here) + reset * hidden);
    const Lanes<F> past = here.step ? h.get(here.before()) : start.get(here);
    const Lanes<F> state = fresh + update * (past - fresh);
    acts.put(here, reset), acts.put(here, update, H), acts.put(here, hidden, 2 * H), acts.put(here, fresh, 3 * H);
    h.put(here, state);
    return state;
  });
}

// grad: of what the state adds to r, z and n, which begin as what they are multiplied by. `flow`: into every state.
template <typename F>
void gru_backward(const Sizes &z, const F *weight, Steps<F> grad_h, Steps<F> update, Steps<F> grad, Steps<F> flow,
                  Steps<F> flow_0, int threads) {
  const int64_t H = z.width;
  const auto past = [=](Place here) {
    here.step++;
    return flow.get(here) * update.get(here);
  };
  const auto cell = [=](Product<F> &sums, int64_t line, Place here, Lanes<F> carried) {
    Lanes<F> all = grad_h.get(here) + carried;
    if (here.step + 1 < z.steps) all += past(here);
    flow.put(here, all);
    for (int64_t n = 0; n < 3; n++) {
      const Lanes<F> values = grad.get(here, n * H) * all;
      grad.put(here, values, n * H), sums.keep(line, here, values, n * H);
    }
  };
  backward(z, weight, 3 * H, threads, cell, [=](Place here, Lanes<F> carried) {
    here.step = -1;
    const Lanes<F> all = z.steps ? carried + past(here) : carried;
    here.step = 0;
    flow_0.put(here, all);
  });
}

// h begins as what inputs and biases make of it.
template <typename F>
void rnn(const Sizes &z, const F *weight, const F *h0, bool relu, Steps<F> h, int threads) {
  forward(z, weight, z.width, h0, threads, [=](Product<F> &sums, int64_t line, Place here) {
    const Lanes<F> value = h.get(here) + sums.get(line, here);
    const Lanes<F> state = !relu ? hyperbolic<F>(value) : value < 0 ? Lanes<F>{} : value;
    h.put(here, state);
    return state;
  });
}

// grad begins as the slope of h.
template <typename F>
void rnn_backward(const Sizes &z, const F *weight, Steps<F> grad_h, Steps<F> grad, Steps<F> flow_0, int threads) {
  const auto cell = [=](Product<F> &sums, int64_t line, Place here, Lanes<F> carried) {
    const Lanes<F> values = grad.get(here) * (grad_h.get(here) + carried);
    grad.put(here, values), sums.keep(line, here, values);
  };
  backward(z, weight, z.width, threads, cell, [=](Place here, Lanes<F> carried) { flow_0.put(here, carried); });
}

// Tensors [B, T, features] as address and strides, three numbers each; sizes first.
template <typename F>
struct Call {
  const int64_t *numbers;
  Sizes sizes() const { return {numbers[0], numbers[1], numbers[2]}; }
  Steps<F> steps(int n) const {
    const int64_t *at = numbers + 3 + 3 * n;
    return {reinterpret_cast<F *>(at[0]), at[1], at[2]};
  }
  const F *data(int n) const { return steps(n).data; }
};

}  // namespace

#define CELLS(type, F)                                                                                             \
  extern "C" void lstm_##type(const int64_t *numbers, int, int threads) {                                          \
    const Call<F> a{numbers};                                                                                      \
    lstm<F>(a.sizes(), a.data(0), a.data(1), a.data(2), a.steps(3), a.steps(4), a.steps(5), a.steps(6), a.steps(7), \
            threads);                                                                                              \
  }                                                                                                                \
  extern "C" void lstm_backward_##type(const int64_t *numbers, int, int threads) {                                 \
    const Call<F> a{numbers};                                                                                      \
    lstm_backward<F>(a.sizes(), a.data(0), a.data(1), a.steps(2), a.steps(3), a.steps(4), a.steps(5), a.steps(6),  \
                     a.steps(7), a.steps(8), threads);                                                             \
  }                                                                                                                \
  extern "C" void gru_##type(const int64_t *numbers, int, int threads) {                                           \
    const Call<F> a{numbers};                                                                                      \
    gru<F>(a.sizes(), a.data(0), a.data(1), a.steps(2), a.steps(3), a.steps(4), threads);                          \
  }                                                                                                                \
  extern "C" void gru_backward_##type(const int64_t *numbers, int, int threads) {                                  \
    const Call<F> a{numbers};                                                                                      \
    gru_backward<F>(a.sizes(), a.data(0), a.steps(1), a.steps(2), a.steps(3), a.steps(4), a.steps(5), threads);    \
  }                                                                                                                \
  extern "C" void rnn_##type(const int64_t *numbers, int relu, int threads) {                                      \
    const Call<F> a{numbers};                                                                                      \
    rnn<F>(a.sizes(), a.data(0), a.data(1), relu, a.steps(2), threads);                                            \
  }                                                                                                                \
  extern "C" void rnn_backward_##type(const int64_t *numbers, int, int threads) {                                  \
    const Call<F> a{numbers};                                                                                      \
    rnn_backward<F>(a.sizes(), a.data(0), a.steps(1), a.steps(2), a.steps(3), threads);                            \
  }
CELLS(float32, float)
CELLS(float64, double)
