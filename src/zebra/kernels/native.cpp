// Causal attention where query i of a row sees the keys [lo_i, hi_i), neither end ever falling: forward and backward,
// float32 or bfloat16, heads of 64 or 128 numbers, AVX-512 (FlashAttention, arXiv 2205.14135, sections 3.1 and 3.2).
//
// A tile is 64 queries. Its scores are held transposed, S^T[key][query]: the lanes of a vector are queries, so that the
// softmax runs down columns, and keys and values are read by broadcast from where they stand. Every product is one
// micro-kernel, C[r][lanes] += broadcast(A[r * SR + t * ST]) * B[t][lanes], where A and B hold units of 32 bits: one
// float32, or two bfloat16 that are neighbours along the sum.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))  // registers must stay registers

// A tensor (batch, heads, tokens, D): strides in numbers, the D numbers of a row adjacent.
struct View {
  char* data;
  int64_t batch, head, row;
};

// The arguments of both functions, as native.py fills them in.
struct Call {
  View q, k, v, out, grad, dq, dk, dv;
  float *lse, *dlse;       // (batch, heads, queries)
  const int32_t *lo, *hi;  // (batch, queries)
  int32_t batch, heads, kv_heads, queries, keys, threads;
  float scale;
};

namespace {

using V = __m512;
constexpr int LANES = 64;    // queries of a tile
constexpr int BLOCK = 60;    // keys of a tile at a time: scores that stay in the first cache
constexpr int ROWS = 6;      // of a product by four vectors at a time: 24 sums, 4 lanes and 1 broadcast in 32 registers
constexpr int SLACK = 512;   // keys that sums of gradients move on by
constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f, LOWEST = -1e30f;

// -- arithmetic

template <bool BF> INLINE V multiply_add(V a, V b, V c) {
  if constexpr (BF) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  else return _mm512_fmadd_ps(a, b, c);
}

// MR rows of C by NV vectors, leading dimension LD of B and C.
template <bool BF, int MR, int NV, int SR, int ST, int LD, bool ADD>
__attribute__((noinline)) void micro(const float* A, const float* B, int T, float* C) {
  V c[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) c[r][v] = ADD ? _mm512_loadu_ps(C + r * LD + v * 16) : _mm512_setzero_ps();
  for (int t = 0; t < T; t++, A += ST, B += LD) {
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = _mm512_load_ps(B + v * 16);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      V a = _mm512_set1_ps(A[r * SR]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = multiply_add<BF>(a, b[v], c[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(C + r * LD + v * 16, c[r][v]);
}

// The same for any number of rows: the rest in halves.
template <bool BF, int NV, int SR, int ST, int LD, bool ADD>
void product(int rows, const float* A, const float* B, int T, float* C) {
  constexpr int M = ROWS * 4 / NV;
  int r = 0;
  for (; r + M <= rows; r += M) micro<BF, M, NV, SR, ST, LD, ADD>(A + r * SR, B, T, C + r * LD);
  if constexpr (M > 8) {
    if (r + 8 <= rows) micro<BF, 8, NV, SR, ST, LD, ADD>(A + r * SR, B, T, C + r * LD), r += 8;
  }
  if (r + 4 <= rows) micro<BF, 4, NV, SR, ST, LD, ADD>(A + r * SR, B, T, C + r * LD), r += 4;
  if (r + 2 <= rows) micro<BF, 2, NV, SR, ST, LD, ADD>(A + r * SR, B, T, C + r * LD), r += 2;
  if (r < rows) micro<BF, 1, NV, SR, ST, LD, ADD>(A + r * SR, B, T, C + r * LD);
}

// 2^x to about 1e-7 of it, by a polynomial on [0, 1); -inf gives 0.
INLINE V exp2(V x) {
  V f = _mm512_reduce_ps(x, 0x01);  // x - floor(x)
  V p = _mm512_set1_ps(1.8775767e-3f);
  for (float c : {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);
}

// -- layouts

INLINE void transpose16(V r[16]) {
  V t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1], c = (__m512d)t[4 * i + 2], d = (__m512d)t[4 * i + 3];
    r[4 * i] = (V)_mm512_unpacklo_pd(a, c);
    r[4 * i + 1] = (V)_mm512_unpackhi_pd(a, c);
    r[4 * i + 2] = (V)_mm512_unpacklo_pd(b, d);
    r[4 * i + 3] = (V)_mm512_unpackhi_pd(b, d);
  }
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 16; half += 8) {
      t[half + i] = _mm512_shuffle_f32x4(r[half + i], r[half + i + 4], 0x88);
      t[half + i + 4] = _mm512_shuffle_f32x4(r[half + i], r[half + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

INLINE __m512i narrow(V low, V high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Two rows of 16 floats as 16 pairs of bfloat16.
INLINE __m512i narrow_pairs(V even, V odd) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(zip, narrow(even, odd));
}

// Numbers of a row in memory, in their own width.
template <bool BF> struct Numbers {
  static constexpr int BYTES = BF ? 2 : 4;
  static INLINE V load(const char* at) {
    if constexpr (!BF) return _mm512_loadu_ps((const float*)at);
    else return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
  }
  static INLINE void store(char* at, V x) {
    if constexpr (!BF) _mm512_storeu_ps((float*)at, x);
    else _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

struct Rows {  // some rows of a view
  char* data;
  ptrdiff_t step;  // in bytes
  char* operator[](ptrdiff_t i) const { return data + i * step; }
  Rows from(ptrdiff_t i) const { return {data + i * step, step}; }
};

// `count` rows of `UNITS` units, one after another; rows past n are 0.
template <int UNITS> void pack_rows(Rows from, int n, int count, float* to) {
  for (int i = 0; i < n; i++) memcpy(to + (size_t)i * UNITS, from[i], UNITS * 4);
  if (n < count) memset(to + (size_t)n * UNITS, 0, (size_t)(count - n) * UNITS * 4);
}

// A tile's n rows of `UNITS` units as to[unit][query]; queries past n are 0.
template <int UNITS> void pack_transposed(Rows from, int n, float* to) {
  for (int i = 0; i < LANES; i += 16)
    for (int u = 0; u < UNITS; u += 16) {
      V r[16];
      for (int x = 0; x < 16; x++)
        r[x] = i + x < n ? _mm512_loadu_ps((const float*)from[i + x] + u) : _mm512_setzero_ps();
      transpose16(r);
      for (int x = 0; x < 16; x++) _mm512_store_ps(to + (u + x) * LANES + i, r[x]);
    }
}

// `count` rows of D bfloat16 as to[row / 2][number]: a unit is two rows' numbers; rows past n are 0.
template <int D> void pack_pairs(Rows from, int n, int count, float* to) {
  for (int i = 0; i < count; i += 2)
    for (int d = 0; d < D; d += 16) {
      V even = i < n ? Numbers<true>::load(from[i] + 2 * d) : _mm512_setzero_ps();
      V odd = i + 1 < n ? Numbers<true>::load(from[i + 1] + 2 * d) : _mm512_setzero_ps();
      __m512i low = _mm512_srli_epi32((__m512i)even, 16);
      _mm512_store_si512((__m512i*)(to + (size_t)i / 2 * D + d), _mm512_or_si512(low, (__m512i)odd));
    }
}

// from[number][query] * factor[query] to a tile's n rows.
template <bool BF, int D> void unpack_transposed(const float* from, const V* factor, int n, Rows to) {
  for (int i = 0; i < n; i += 16)
    for (int d = 0; d < D; d += 16) {
      V r[16];
      for (int x = 0; x < 16; x++) r[x] = _mm512_mul_ps(_mm512_load_ps(from + (d + x) * LANES + i), factor[i / 16]);
      transpose16(r);
      for (int x = 0; x < 16 && i + x < n; x++) Numbers<BF>::store(to[i + x] + d * Numbers<BF>::BYTES, r[x]);
    }
}

// Memory of a thread that begins with a cache line.
struct Buffer {
  float* data;
  explicit Buffer(size_t floats) : data((float*)aligned_alloc(64, (floats * 4 + 64) / 64 * 64)) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
};

template <bool BF> Rows rows_of(const View& view, int row, int head) {
  const ptrdiff_t bytes = Numbers<BF>::BYTES;
  return {view.data + (row * view.batch + head * view.head) * bytes, view.row * bytes};
}

// Whether the rows of every head can be read as units where they stand.
template <bool BF, int D> bool stands(const View& view) {
  const int64_t bytes = Numbers<BF>::BYTES, odd = (int64_t)view.data | view.batch * bytes | view.head * bytes;
  return view.row == D && odd % 4 == 0;
}

// The keys or values of a head as units: where they stand, or copied.
template <bool BF, int D> struct Units {
  bool in_place;
  Buffer copy;
  const float* data = nullptr;
  Units(const View& view, int keys) : in_place(stands<BF, D>(view)), copy(in_place ? 0 : (size_t)keys * D) {}
  void take(Rows rows, int keys) {
    data = in_place ? (const float*)rows.data : copy.data;
    if (!in_place) pack_rows<BF ? D / 2 : D>(rows, keys, keys, copy.data);
  }
};

// -- which keys a tile sees

// Keys [lo, hi) for the queries of `vectors` vectors from `lane` on.
struct Segment {
  int lo, hi, lane, vectors;
};

// Keys of a segment: [.., whole) and [end, ..) are seen by some of the queries, [whole, end) by all.
struct Cut {
  int whole, end;
};

// Keys come in `UNIT`s, two where bfloat16 is summed over them: all bounds are multiples of it.
template <int UNIT> struct Tile {
  alignas(64) int32_t lo[LANES], count[LANES];
  Segment segments[3];
  int n, used;

  void take(const int32_t* from, const int32_t* to, int queries) {
    n = std::min(LANES, queries);
    for (int i = 0; i < LANES; i++) {
      int at = std::min(i, n - 1);  // what is past the end is not written
      lo[i] = from[at], count[i] = std::max(0, to[at] - from[at]);
    }
    constexpr int HALF = LANES / 2;
    const int a = down(from[0]), c = up(to[std::min(HALF, n) - 1]);
    const bool second = n > HALF;
    const int b = second ? down(from[HALF]) : c, d = second ? up(to[n - 1]) : c;
    used = 0;
    // Both halves of the queries against what both see; either alone against what only it sees.
    add(a, std::min(b, c), 0, 2), add(b, c, 0, 4), add(std::max(b, c), d, 2, 2);
  }
  int first() const { return used ? segments[0].lo : 0; }
  int last() const { return used ? segments[used - 1].hi : 0; }

  Cut cut(int begin, int end, int lane, int vectors) const {
    const int last = 16 * (lane + vectors) - 1, whole = std::clamp(up(lo[last]), begin, end);
    return {whole, std::clamp(down(lo[16 * lane] + count[16 * lane]), whole, end)};
  }
  INLINE __mmask16 sees(int key, int vector) const {  // key - lo < count, and not below 0
    __m512i past = _mm512_sub_epi32(_mm512_set1_epi32(key), _mm512_load_si512(lo + 16 * vector));
    return _mm512_cmplt_epu32_mask(past, _mm512_load_si512(count + 16 * vector));
  }

 private:
  static int down(int key) { return key / UNIT * UNIT; }
  static int up(int key) { return (key + UNIT - 1) / UNIT * UNIT; }
  void add(int begin, int end, int lane, int vectors) {
    if (begin < end) segments[used++] = {begin, end, lane, vectors};
  }
};

// Calls block<vectors>(first key, keys, first vector) for equal parts of the tile's keys.
template <class Worker, class T> void walk(Worker& worker, const T& tile) {
  for (int s = 0; s < tile.used; s++) {
    const Segment& part = tile.segments[s];
    const int length = part.hi - part.lo, blocks = (length + BLOCK - 1) / BLOCK;
    const int step = ((length + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    for (int key = part.lo; key < part.hi; key += step) {
      const int count = std::min(step, part.hi - key);
      if (part.vectors == 4) worker.template block<4>(key, count, part.lane);
      else worker.template block<2>(key, count, part.lane);
    }
  }
}

// -- forward: a task is one query head of one row

template <bool BF, int D> struct Forward {
  static constexpr int UNIT = BF ? 2 : 1, UNITS = D / UNIT;
  const Call& call;
  alignas(64) float qt[UNITS * LANES], scores[BLOCK * LANES], pairs[BLOCK * LANES / 2], mixed[D * LANES];
  V peak[4], total[4];
  Tile<UNIT> tile;
  Units<BF, D> k, v;
  Buffer paired;
  const float* values = nullptr;

  explicit Forward(const Call& c)
      : call(c), k(c.k, c.keys), v(c.v, BF ? 0 : c.keys), paired(BF ? (size_t)(c.keys + 1) / 2 * D : 0) {}

  static int tasks(const Call& c) { return c.batch * c.heads; }

  void run(int task) {
    const int row = task / call.heads, head = task % call.heads, kv = head / (call.heads / call.kv_heads);
    k.take(rows_of<BF>(call.k, row, kv), call.keys);
    if constexpr (BF) pack_pairs<D>(rows_of<BF>(call.v, row, kv), call.keys, call.keys, paired.data);
    else v.take(rows_of<BF>(call.v, row, kv), call.keys);
    values = BF ? paired.data : v.data;
    const Rows q = rows_of<BF>(call.q, row, head), out = rows_of<BF>(call.out, row, head);
    const size_t bounds = (size_t)row * call.queries;
    for (int i = 0; i < call.queries; i += LANES) {
      tile.take(call.lo + bounds + i, call.hi + bounds + i, call.queries - i);
      pack_transposed<UNITS>(q.from(i), tile.n, qt);
      memset(mixed, 0, sizeof mixed);
      for (int x = 0; x < 4; x++) peak[x] = _mm512_set1_ps(LOWEST), total[x] = _mm512_setzero_ps();
      walk(*this, tile);
      finish(out.from(i), call.lse + (size_t)task * call.queries + i);
    }
  }

  template <int NV> void block(int key, int keys, int lane) {
    const int read = std::min(keys, call.keys - key);
    product<BF, NV, UNITS, 1, LANES, false>(read, k.data + (size_t)key * UNITS, qt + 16 * lane, UNITS, scores);
    const Cut cut = tile.cut(key, key + keys, lane, NV);
    const V scale = _mm512_set1_ps(call.scale * LOG2E);
    V highest[NV], sum[NV];
    for (int x = 0; x < NV; x++) highest[x] = _mm512_set1_ps(-INFINITY), sum[x] = _mm512_setzero_ps();
    raise<NV, true>(key, key, cut.whole, lane, highest);
    raise<NV, false>(key, cut.whole, cut.end, lane, highest);
    raise<NV, true>(key, cut.end, key + keys, lane, highest);
    for (int x = 0; x < NV; x++) highest[x] = _mm512_max_ps(peak[lane + x], _mm512_mul_ps(highest[x], scale));
    weigh<NV, true>(key, key, cut.whole, lane, scale, highest, sum);
    weigh<NV, false>(key, cut.whole, cut.end, lane, scale, highest, sum);
    weigh<NV, true>(key, cut.end, key + keys, lane, scale, highest, sum);
    for (int x = 0; x < NV; x++) rescale(lane + x, highest[x], sum[x]);
    const float* weights = BF ? pairs : scores;
    product<BF, NV, 1, D, LANES, true>(D, values + (size_t)key / UNIT * D, weights, keys / UNIT, mixed + 16 * lane);
  }

  // highest = max over the keys [begin, end) of the block that starts at `key`.
  template <int NV, bool EDGE> INLINE void raise(int key, int begin, int end, int lane, V* highest) {
    V m[NV];
    for (int x = 0; x < NV; x++) m[x] = highest[x];
    for (int j = begin; j < end; j++)
      for (int x = 0; x < NV; x++) {
        V s = _mm512_load_ps(scores + (j - key) * LANES + 16 * x);
        m[x] = EDGE ? _mm512_mask_max_ps(m[x], tile.sees(j, lane + x), m[x], s) : _mm512_max_ps(m[x], s);
      }
    for (int x = 0; x < NV; x++) highest[x] = m[x];
  }

  // Scores to weights 2^(scale s - m), in place, or in bfloat16 to pairs of keys.
  template <int NV, bool EDGE>
  INLINE void weigh(int key, int begin, int end, int lane, V scale, const V* m, V* total_) {
    V sum[NV];
    for (int x = 0; x < NV; x++) sum[x] = total_[x];
    for (int j = begin; j < end; j += UNIT)
      for (int x = 0; x < NV; x++) {
        V p[UNIT];
        for (int u = 0; u < UNIT; u++) {
          float* at = scores + (j + u - key) * LANES + 16 * x;
          p[u] = exp2(_mm512_fmsub_ps(_mm512_load_ps(at), scale, m[x]));
          if (EDGE) p[u] = _mm512_maskz_mov_ps(tile.sees(j + u, lane + x), p[u]);
          sum[x] = _mm512_add_ps(sum[x], p[u]);
          if constexpr (!BF) _mm512_store_ps(at, p[u]);
        }
        if constexpr (BF)
          _mm512_store_si512((__m512i*)(pairs + (j - key) / 2 * LANES + 16 * x), narrow_pairs(p[0], p[1]));
      }
    for (int x = 0; x < NV; x++) total_[x] = sum[x];
  }

  // What was summed so far, to a new peak.
  INLINE void rescale(int vector, V highest, V sum) {
    V kept = exp2(_mm512_sub_ps(peak[vector], highest));
    total[vector] = _mm512_fmadd_ps(total[vector], kept, sum);
    if (_mm512_cmp_ps_mask(peak[vector], highest, _CMP_NEQ_OQ))
      for (float* at = mixed + 16 * vector; at < mixed + D * LANES; at += LANES)
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), kept));
    peak[vector] = highest;
  }

  // A query that sees no key has the sum 0: its output is 0, its log-sum-exp -inf.
  void finish(Rows out, float* lse) {
    alignas(64) float peaks[LANES], totals[LANES];
    V inverse[4];
    for (int x = 0; x < 4; x++) {
      __mmask16 some = _mm512_cmp_ps_mask(total[x], _mm512_setzero_ps(), _CMP_GT_OQ);
      inverse[x] = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), total[x]);
      _mm512_store_ps(peaks + 16 * x, peak[x]), _mm512_store_ps(totals + 16 * x, total[x]);
    }
    unpack_transposed<BF, D>(mixed, inverse, tile.n, out);
    for (int i = 0; i < tile.n; i++) lse[i] = LN2 * (peaks[i] + log2f(totals[i]));
  }
};

// -- backward: a task is one key-value head of one row

// A gradient of keys or values, summed in float32: in place where it can be, else in rows that move on with the tiles.
template <bool BF, int D> struct Sum {
  bool in_place;
  int room, keys, base = 0, end = 0;  // rows [base, end) are held
  Buffer held;
  Rows into{};
  float* data = nullptr;

  Sum(const View& view, int widest, int all)
      : in_place(!BF && view.row == D),
        room(in_place ? all : std::min(all, widest + SLACK)),
        keys(all),
        held(in_place ? 0 : (size_t)room * D) {}

  void take(Rows rows) { into = rows, base = end = 0, data = in_place ? (float*)rows.data : held.data; }
  float* at(int key) { return data + (ptrdiff_t)(key - base) * D; }

  // No later tile sees a key before lo; this one sees none from hi on.
  void reach(int lo, int hi) {
    hi = std::min(hi, keys);
    if (hi - base > room) {
      write(lo);
      if (lo < end) memmove(data, at(lo), (size_t)(end - lo) * D * 4);
      base = lo, end = std::max(end, lo);
    }
    if (end < hi) memset(at(end), 0, (size_t)(hi - end) * D * 4), end = hi;
  }
  void finish() {
    if (in_place) memset(at(end), 0, (size_t)(keys - end) * D * 4);
    else write(keys);
  }

 private:
  void write(int until) {  // keys that no tile saw are 0
    for (int key = base; key < until; key++)
      for (int d = 0; d < D; d += 16)
        Numbers<BF>::store(into[key] + d * Numbers<BF>::BYTES,
                           key < end ? _mm512_loadu_ps(at(key) + d) : _mm512_setzero_ps());
  }
};

template <bool BF, int D> struct Backward {
  static constexpr int UNIT = BF ? 2 : 1, UNITS = D / UNIT;
  const Call& call;
  alignas(64) float qt[UNITS * LANES], dot[UNITS * LANES];   // queries and output gradients, [unit][query]
  alignas(64) float q[UNITS * LANES], grad[UNITS * LANES];  // the same as the lanes of dk and dv, [query][number]
  alignas(64) float dqt[D * LANES], lse[LANES], delta[LANES];
  alignas(64) float weights[BLOCK * LANES], slopes[BLOCK * LANES];  // P and dS, [key][query]
  alignas(64) float narrow_weights[BLOCK * LANES / 2], narrow_slopes[BLOCK * LANES / 2], slope_pairs[BLOCK * LANES / 2];
  Tile<UNIT> tile;
  Units<BF, D> k, v;
  Buffer paired;  // keys in pairs, for dq in bfloat16
  Sum<BF, D> dk, dv;

  explicit Backward(const Call& c)
      : call(c),
        k(c.k, c.keys),
        v(c.v, c.keys),
        paired(BF ? (size_t)(c.keys + 1) / 2 * D : 0),
        dk(c.dk, widest(c), c.keys),
        dv(c.dv, widest(c), c.keys) {}

  static int tasks(const Call& c) { return c.batch * c.kv_heads; }

  // Keys that a tile sees at most, and the fewer than UNIT on either side.
  static int widest(const Call& c) {
    int found = 0;
    for (int row = 0; row < c.batch; row++)
      for (int i = 0; i < c.queries; i += LANES) {
        const size_t first = (size_t)row * c.queries + i, last = first + std::min(LANES, c.queries - i) - 1;
        found = std::max(found, c.hi[last] - c.lo[first]);
      }
    return found + 2 * (UNIT - 1);
  }

  void run(int task) {
    const int row = task / call.kv_heads, kv = task % call.kv_heads, group = call.heads / call.kv_heads;
    const size_t bounds = (size_t)row * call.queries;
    k.take(rows_of<BF>(call.k, row, kv), call.keys), v.take(rows_of<BF>(call.v, row, kv), call.keys);
    if constexpr (BF) pack_pairs<D>(rows_of<BF>(call.k, row, kv), call.keys, call.keys, paired.data);
    dk.take(rows_of<BF>(call.dk, row, kv)), dv.take(rows_of<BF>(call.dv, row, kv));
    for (int i = 0; i < call.queries; i += LANES) {
      tile.take(call.lo + bounds + i, call.hi + bounds + i, call.queries - i);
      if (tile.used) dk.reach(tile.first(), tile.last()), dv.reach(tile.first(), tile.last());
      for (int head = kv * group; head < (kv + 1) * group; head++) {
        load(row, head, i);
        walk(*this, tile);
        const V one[4] = {_mm512_set1_ps(1), _mm512_set1_ps(1), _mm512_set1_ps(1), _mm512_set1_ps(1)};
        unpack_transposed<BF, D>(dqt, one, tile.n, rows_of<BF>(call.dq, row, head).from(i));
      }
    }
    dk.finish(), dv.finish();
  }

  // A tile's queries, output gradients, log-sum-exps in base 2, and delta = scale (<out, grad> - dlse).
  void load(int row, int head, int i) {
    const Rows queries = rows_of<BF>(call.q, row, head).from(i), gradients = rows_of<BF>(call.grad, row, head).from(i),
               out = rows_of<BF>(call.out, row, head).from(i);
    pack_transposed<UNITS>(queries, tile.n, qt), pack_transposed<UNITS>(gradients, tile.n, dot);
    if constexpr (BF) pack_pairs<D>(queries, tile.n, LANES, q), pack_pairs<D>(gradients, tile.n, LANES, grad);
    else pack_rows<D>(queries, tile.n, LANES, q), pack_rows<D>(gradients, tile.n, LANES, grad);
    memset(dqt, 0, sizeof dqt);
    const size_t at = ((size_t)row * call.heads + head) * call.queries + i;
    for (int x = 0; x < LANES; x++) {
      lse[x] = INFINITY, delta[x] = 0;  // the weight 0: for what is past the end, and sees no key
      if (x >= tile.n || tile.count[x] == 0) continue;
      V sum = _mm512_setzero_ps();
      for (int d = 0; d < D * Numbers<BF>::BYTES; d += 16 * Numbers<BF>::BYTES)
        sum = _mm512_fmadd_ps(Numbers<BF>::load(gradients[x] + d), Numbers<BF>::load(out[x] + d), sum);
      lse[x] = call.lse[at + x] * LOG2E;
      delta[x] = call.scale * (_mm512_reduce_add_ps(sum) - call.dlse[at + x]);
    }
  }

  template <int NV> void block(int key, int keys, int lane) {
    constexpr int QUERIES = NV * 16 / UNIT;  // in units
    const int read = std::min(keys, call.keys - key);
    product<BF, NV, UNITS, 1, LANES, false>(read, k.data + (size_t)key * UNITS, qt + 16 * lane, UNITS, weights);
    product<BF, NV, UNITS, 1, LANES, false>(read, v.data + (size_t)key * UNITS, dot + 16 * lane, UNITS, slopes);
    const Cut cut = tile.cut(key, key + keys, lane, NV);
    differentiate<NV, true>(key, key, cut.whole, lane);
    differentiate<NV, false>(key, cut.whole, cut.end, lane);
    differentiate<NV, true>(key, cut.end, key + keys, lane);
    const float *p = BF ? narrow_weights : weights, *ds = BF ? narrow_slopes : slopes;
    const size_t own = (size_t)lane * 16 / UNIT * D;
    for (int d = 0; d < D; d += 64) {
      product<BF, 4, LANES / UNIT, 1, D, true>(read, p, grad + own + d, QUERIES, dv.at(key) + d);
      product<BF, 4, LANES / UNIT, 1, D, true>(read, ds, q + own + d, QUERIES, dk.at(key) + d);
    }
    const float* sides = BF ? paired.data + (size_t)key / 2 * D : k.data + (size_t)key * D;
    product<BF, NV, 1, D, LANES, true>(D, sides, BF ? slope_pairs : slopes, keys / UNIT, dqt + 16 * lane);
  }

  // P = 2^(scale s - lse) and dS = P (scale dP - delta), in place, or narrowed to rows and dS also to pairs of keys.
  template <int NV, bool EDGE> INLINE void differentiate(int key, int begin, int end, int lane) {
    const V scale = _mm512_set1_ps(call.scale), scale2 = _mm512_set1_ps(call.scale * LOG2E);
    for (int j = begin; j < end; j += UNIT)
      for (int x = 0; x < NV; x += 2) {
        V p[UNIT][2], ds[UNIT][2];
        for (int u = 0; u < UNIT; u++)
          for (int y = 0; y < 2; y++) {
            const int at = (j + u - key) * LANES + 16 * (x + y), own = 16 * (lane + x + y);
            p[u][y] = exp2(_mm512_fmsub_ps(_mm512_load_ps(weights + at), scale2, _mm512_load_ps(lse + own)));
            V rest = _mm512_fmsub_ps(_mm512_load_ps(slopes + at), scale, _mm512_load_ps(delta + own));
            const __mmask16 seen = EDGE ? tile.sees(j + u, lane + x + y) : (__mmask16)-1;
            if (EDGE) p[u][y] = _mm512_maskz_mov_ps(seen, p[u][y]);
            ds[u][y] = EDGE ? _mm512_maskz_mul_ps(seen, p[u][y], rest) : _mm512_mul_ps(p[u][y], rest);
            if constexpr (!BF) _mm512_store_ps(weights + at, p[u][y]), _mm512_store_ps(slopes + at, ds[u][y]);
          }
        if constexpr (BF)
          for (int u = 0; u < 2; u++) {
            const int row = (j + u - key) * LANES / 2 + 8 * x, pair = (j - key) / 2 * LANES + 16 * (x + u);
            _mm512_store_si512((__m512i*)(narrow_weights + row), narrow(p[u][0], p[u][1]));
            _mm512_store_si512((__m512i*)(narrow_slopes + row), narrow(ds[u][0], ds[u][1]));
            _mm512_store_si512((__m512i*)(slope_pairs + pair), narrow_pairs(ds[0][u], ds[1][u]));
          }
      }
  }
};

// -- tasks in threads

// 0, or 1 where there was no memory. Each task is done by one thread, so their number does not show in the result.
template <class Worker> int in_threads(const Call& call) {
  const int tasks = Worker::tasks(call);
  std::atomic<int> next{0}, working{0};
  auto work = [&] {
    try {
      auto worker = std::make_unique<Worker>(call);
      working++;
      for (int task; (task = next++) < tasks;) worker->run(task);
    } catch (const std::bad_alloc&) {  // the others take its tasks
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < std::min(call.threads, tasks); i++) helpers.emplace_back(work);
  } catch (...) {  // fewer will do
  }
  work();
  for (auto& helper : helpers) helper.join();
  return working == 0;
}

}  // namespace

extern "C" {
int forward_float32_64(const Call* call) { return in_threads<Forward<false, 64>>(*call); }
int forward_float32_128(const Call* call) { return in_threads<Forward<false, 128>>(*call); }
int backward_float32_64(const Call* call) { return in_threads<Backward<false, 64>>(*call); }
int backward_float32_128(const Call* call) { return in_threads<Backward<false, 128>>(*call); }
#ifdef __AVX512BF16__
int forward_bfloat16_64(const Call* call) { return in_threads<Forward<true, 64>>(*call); }
int forward_bfloat16_128(const Call* call) { return in_threads<Forward<true, 128>>(*call); }
int backward_bfloat16_64(const Call* call) { return in_threads<Backward<true, 64>>(*call); }
int backward_bfloat16_128(const Call* call) { return in_threads<Backward<true, 128>>(*call); }
#endif
}
