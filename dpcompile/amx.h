// Gram matrices of bfloat16 by the tiles of Intel AMX: products are exact and added up in float32.
//
// An element is a sum over steps of 32 products. Even and odd ones are added up apart, then together and to what there is,
// all in float32, rounded to the nearest, with subnormal numbers as zero (Intel, Instruction set extensions and future
// features, TDPBF16PS): 16 + 1 roundings and one for each step.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define DPCOMPILE_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"

namespace {

constexpr int64_t SIDE = 16, STEP = 32, TILE = SIDE * STEP;  // positions and elements of a tile
constexpr int64_t NEAR = 8;                                  // steps whose tiles stay in the first cache

// Whether the system lets this process use tiles.
inline bool tiles_allowed() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // asm/prctl.h: ARCH_REQ_XCOMP_PERM; XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

// What is written so far is in memory: the intrinsics do not tell the compiler what they read.
inline void settle(const void *at) { asm volatile("" ::"r"(at) : "memory"); }

// Tiles of a thread, all of 16 lines of 64 bytes, for as long as this lives.
class TileSetting {
 public:
  TileSetting() {
    struct alignas(64) {
      uint8_t palette = 1, rest[15] = {};
      uint16_t bytes[16] = {};
      uint8_t lines[16] = {};
    } setting;
    for (int i = 0; i < 8; i++) setting.bytes[i] = 64, setting.lines[i] = SIDE;
    settle(&setting);
    _tile_loadconfig(&setting);
  }
  ~TileSetting() { _tile_release(); }
  TileSetting(const TileSetting &) = delete;
};

// Tiles of a left factor, which have a line for each position, as those of a right one: pairs of elements transposed.
inline void turn(const uint16_t *left, int64_t steps, uint16_t *right) {
  for (; steps > 0; steps--, left += TILE, right += TILE) {
    Lanes<float> lines[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) std::memcpy(&lines[i], left + i * STEP, BYTES);
    transpose<float>(lines);
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) std::memcpy(right + i * STEP, &lines[i], BYTES);
  }
}

// Elements of one position, side by side, as a line of the tiles of a left factor; the sum of their squares.
inline float copy_line(const uint16_t *from, int64_t width, uint16_t *left) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += STEP, left += TILE) {
    const int64_t some = std::min(STEP, width - k);
    const __mmask32 there = some == STEP ? ~__mmask32(0) : (__mmask32(1) << some) - 1;
    const __m512i pairs = _mm512_maskz_loadu_epi16(there, from + k);
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
    even = _mm512_fmadd_ps(low, low, even), odd = _mm512_fmadd_ps(high, high, odd);
    _mm512_storeu_si512(left, pairs);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// 16 lines by up to three panels of a Gram matrix, after so many steps; `next`: from a panel to the one beside it.
inline void tile_product(int64_t n, const uint16_t *left, const uint16_t *right, int64_t next, int64_t steps, bool add,
                         float *out) {
  static_assert(PANELS == 3);
  constexpr int LINE = PANELS * SIDE * sizeof(float), WIDE = STEP * sizeof(uint16_t);
  settle(left);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  if (add) {
    _tile_loadd(0, out, LINE);
    if (n > 1) _tile_loadd(1, out + SIDE, LINE);
    if (n > 2) _tile_loadd(2, out + 2 * SIDE, LINE);
  }
  for (int64_t step = 0; step < steps; step++, left += TILE, right += TILE) {
    _tile_loadd(3, left, WIDE);
    _tile_loadd(4, right, WIDE);
    _tile_dpbf16ps(0, 3, 4);
    if (n > 1) {
      _tile_loadd(5, right + next, WIDE);
      _tile_dpbf16ps(1, 3, 5);
    }
    if (n > 2) {
      _tile_loadd(6, right + 2 * next, WIDE);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, out, LINE);
  if (n > 1) _tile_stored(1, out + SIDE, LINE);
  if (n > 2) _tile_stored(2, out + 2 * SIDE, LINE);
}

}  // namespace

#endif
