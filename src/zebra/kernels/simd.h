// Vectors of float32 as wide as the CPU's, the element types in memory, and what differs between instruction sets.
// All else is the compiler's vector arithmetic: a * b + c is one instruction, `a < b ? c : d` chooses lane by lane.
#pragma once

#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#if defined __AMX_BF16__ && defined __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

#define INLINE inline __attribute__((always_inline))  // registers must stay registers

#if defined __AVX512F__ && defined __AVX512DQ__ && defined __AVX512BW__
#define WITH_AVX512
constexpr char NAME[] = "AVX-512";
constexpr int WIDTH = 16, GROUP = 4;  // floats of a vector; vectors of a row of a product
#elif defined __AVX2__
constexpr char NAME[] = "AVX2";
constexpr int WIDTH = 8, GROUP = 2;
#else
constexpr char NAME[] = "NEON";
constexpr int WIDTH = 4, GROUP = 4;
#endif
constexpr int ROWS = 6;  // of a product: ROWS * GROUP sums, GROUP lanes and 1 broadcast in the registers

typedef float V __attribute__((vector_size(WIDTH * 4)));
typedef int32_t I __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t U __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Half __attribute__((vector_size(WIDTH * 2)));  // 16-bit elements

template <class T> struct __attribute__((packed, may_alias)) Anywhere {  // memory of any type and alignment
  T x;
};
template <class T> INLINE T load(const void* at) { return ((const Anywhere<T>*)at)->x; }
template <class T> INLINE void store(void* at, T x) { ((Anywhere<T>*)at)->x = x; }

INLINE V broadcast(float x) { return x - V{}; }
INLINE U broadcast(uint32_t x) { return x - U{}; }
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE bool any(I mask) {
#ifdef WITH_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int64_t halves[WIDTH / 2], bits = 0;
  store(halves, mask);
  for (int64_t half : halves) bits |= half;
  return bits;
#endif
}

// 2^x with a relative error of about 1e-7, by a polynomial on [0, 1]; -inf gives 0.
INLINE V exp2(V x) {
#ifdef WITH_AVX512
  const V f = _mm512_reduce_ps(x, 0x01);  // x - floor(x)
#else
  const V shifted = x - 0.5f + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);  // the last bits of `shifted`: floor(x)
#endif
  V p = broadcast(1.8775767e-3f);
  for (float c : {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f}) p = p * f + c;
#ifdef WITH_AVX512
  return _mm512_scalef_ps(p, x);
#else
  return x < -126.0f ? V{} : p * (V)(((I)shifted << 23) + (127 << 23));
#endif
}

// tanh(x) with an error of about 1e-7.
INLINE V tanh(V x) {
  const V power = x * 2.88539008f;  // e^2x = 2^power
  return 1.0f - 2.0f / (1.0f + exp2(power > 126.0f ? broadcast(126.0f) : power));
}

// a[FIRST], b[FIRST], a[FIRST + 1], ...: half of a and half of b.
template <int FIRST> INLINE V interleave(V a, V b) {
#ifdef __clang__
  V both;
  for (int i = 0; i < WIDTH; i++) both[i] = (i % 2 ? b : a)[FIRST + i / 2];
  return both;
#else
  I from;
  for (int i = 0; i < WIDTH; i++) from[i] = FIRST + i / 2 + i % 2 * WIDTH;
  return __builtin_shuffle(a, b, from);
#endif
}

// Swap r[x][y] and r[y][x].
INLINE void transpose(V r[WIDTH]) {
  for (int step = 1; step < WIDTH; step *= 2) {
    V t[WIDTH];
    for (int i = 0; i < WIDTH / 2; i++) {
      t[2 * i] = interleave<0>(r[i], r[i + WIDTH / 2]);
      t[2 * i + 1] = interleave<WIDTH / 2>(r[i], r[i + WIDTH / 2]);
    }
    for (int i = 0; i < WIDTH; i++) r[i] = t[i];
  }
}

// The sum of each r[x] over its lanes; r is overwritten.
INLINE V sums(V r[WIDTH]) {
  for (int n = WIDTH / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) r[i] = interleave<0>(r[i], r[i + n]) + interleave<WIDTH / 2>(r[i], r[i + n]);
  return r[0];
}

// -- elements in memory

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE V widen(const float* at) { return load<V>(at); }
INLINE void narrow(float* at, V x) { store(at, x); }

INLINE V widen(const BFloat16* at) { return (V)(__builtin_convertvector(load<Half>(at), U) << 16); }
INLINE void narrow(BFloat16* at, V x) {
  const U bits = (U)x, even = bits + 0x7fff + (bits >> 16 & 1);
  store(at, __builtin_convertvector((x == x ? even : bits) >> 16, Half));
}

#ifdef __aarch64__
INLINE V widen(const Float16* at) { return (V)vcvt_f32_f16(load<float16x4_t>(at)); }
INLINE void narrow(Float16* at, V x) { store(at, vcvt_f16_f32((float32x4_t)x)); }
#elif defined WITH_AVX512
INLINE V widen(const Float16* at) { return _mm512_cvtph_ps(load<__m256i>(at)); }
INLINE void narrow(Float16* at, V x) { store(at, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE V widen(const Float16* at) { return _mm256_cvtph_ps(load<__m128i>(at)); }
INLINE void narrow(Float16* at, V x) { store(at, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#endif

// -- bfloat16 in pairs: a vector holds 2 * WIDTH of them, and a dot product adds the products of two to each float

#if defined WITH_AVX512 && defined __AVX512BF16__
constexpr bool DOTS = true;
INLINE V dot(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
INLINE V joined(V low, V high) { return (V)_mm512_cvtne2ps_pbh(high, low); }
INLINE V zipped(V even, V odd) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (V)_mm512_permutexvar_epi16(zip, (__m512i)joined(even, odd));
}
#elif defined __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr bool DOTS = true;
INLINE V dot(V a, V b, V c) { return (V)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b); }
INLINE V joined(V low, V high) {
  return (V)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}
INLINE V zipped(V even, V odd) {
  const uint16x8_t both = (uint16x8_t)joined(even, odd);
  return (V)vzip1q_u16(both, vextq_u16(both, both, 4));
}
#else
constexpr bool DOTS = false;
INLINE V dot(V, V, V c) { return c; }
INLINE V joined(V low, V) { return low; }
INLINE V zipped(V even, V) { return even; }
#endif

// -- products of bfloat16 by matrix registers (AMX): SIDE rows of SIDE units each

constexpr int SIDE = 16;

#if defined __AMX_BF16__ && defined __AVX512BF16__ && defined __linux__
constexpr bool MATRICES = true;

// Linux gives the registers to a process that asks for them.
inline bool permit_matrices() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

// A thread's matrix registers, all of one shape, as long as this object lives.
struct Matrices {
  Matrices() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = SIDE * 4, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
  }
  ~Matrices() { _tile_release(); }
  Matrices(const Matrices&) = delete;
};

// C = or += A B for M times SIDE rows, N times SIDE lanes and T units, M and N 1 or 2. Strides between rows: LA,
// LB and LC; NEXT between SIDE units of a row of A.
template <int M, int N, int LA, int NEXT, int LB, bool ADD, int LC>
__attribute__((noinline)) void matrix(const float* A, const float* B, int T, float* C) {
  asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  constexpr bool DOWN = M > 1, ALONG = N > 1;
  if constexpr (ADD) {
    _tile_loadd(0, C, LC * 4);
    if constexpr (ALONG) { _tile_loadd(1, C + SIDE, LC * 4); }
    if constexpr (DOWN) { _tile_loadd(2, C + SIDE * LC, LC * 4); }
    if constexpr (DOWN && ALONG) { _tile_loadd(3, C + SIDE * LC + SIDE, LC * 4); }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int t = 0; t < T; t += SIDE, A += NEXT, B += SIDE * LB) {
    _tile_loadd(4, A, LA * 4);
    _tile_loadd(6, B, LB * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ALONG) {
      _tile_loadd(7, B + SIDE, LB * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (DOWN) {
      _tile_loadd(5, A + SIDE * LA, LA * 4);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (DOWN && ALONG) { _tile_dpbf16ps(3, 5, 7); }
  }
  _tile_stored(0, C, LC * 4);
  if constexpr (ALONG) { _tile_stored(1, C + SIDE, LC * 4); }
  if constexpr (DOWN) { _tile_stored(2, C + SIDE * LC, LC * 4); }
  if constexpr (DOWN && ALONG) { _tile_stored(3, C + SIDE * LC + SIDE, LC * 4); }
  asm volatile("" ::: "memory");
}
#else
constexpr bool MATRICES = false;
inline bool permit_matrices() { return true; }
struct Matrices {};
template <int M, int N, int LA, int NEXT, int LB, bool ADD, int LC>
void matrix(const float*, const float*, int, float*);
#endif

}  // namespace
