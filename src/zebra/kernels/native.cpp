// Causal attention in which query i sees the keys [lo_i, hi_i), and neither bound decreases: forward and backward, on
// any CPU that simd.h supports (FlashAttention, arXiv 2205.14135, sections 3.1 and 3.2). Compiled for one element type
// and one head size: -DNUMBER=float, BFloat16 or Float16, -DSIZE=a multiple of 16.
//
// A tile is 64 queries. Its scores are held transposed, S^T[key][query]: the lanes of a vector are queries, so that the
// softmax runs down columns, and keys and values are broadcast from where they are in memory. Every product is one
// micro-kernel, C[r][lanes] += broadcast(A[r * SR + t * ST]) * B[t][lanes], where A and B hold units of 32 bits: one
// float32, or two bfloat16 that are neighbours along the sum, if the CPU has dot products of these (PAIRS). If it has
// matrix registers (AMX), they multiply bfloat16 (SQUARE): 16 rows by 16 units by 16 lanes at once.
#include "simd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

// A tensor (batch, heads, tokens, D): strides in elements; the D elements of a token are contiguous.
struct View {
  ELEMENT* data;
  int64_t batch, head, row;
};

// The arguments of forward, backward and decode, as native.py fills them in.
struct Call {
  View q, k, v, out, grad, dq, dk, dv;
  float *lse, *dlse;       // (batch, heads, queries)
  const int32_t *lo, *hi;  // (batch, queries)
  const float* slopes;     // (heads), ALiBi's, or null
  int32_t batch, heads, kv_heads, queries, keys, threads;
  float scale, softcap;  // a softcap of 0 means none
};

namespace {

constexpr int D = SIZE;
constexpr bool PAIRS = DOTS && std::is_same_v<ELEMENT, BFloat16>;
constexpr bool SQUARE = PAIRS && MATRICES;
constexpr int UNIT = PAIRS ? 2 : 1, UNITS = D / UNIT;  // elements of a unit, units of a head
constexpr int STEP = SQUARE ? UNIT * SIDE : UNIT;      // bounds of what a tile sees are multiples of so many keys
constexpr int LANES = 64;                              // queries of a tile
constexpr int BLOCK = SQUARE ? 128 : 60;               // keys of a tile at a time: their scores stay in the L1 cache
constexpr int SLACK = 512;  // keys by which the buffer of gradient sums moves on
constexpr size_t up(size_t n, size_t of) { return (n + of - 1) / of * of; }
constexpr int ROW = SQUARE ? up(UNITS, SIDE) : UNITS;  // units from row to row; those past UNITS are 0
constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f, LOWEST = -1e30f;

// -- products

INLINE V multiply_add(V a, V b, V c) { return PAIRS ? dot(a, b, c) : a * b + c; }

// MR rows of C by NV vectors, leading dimensions LD of B and LC of C.
template <int MR, int NV, int SR, int ST, int LD, bool ADD, int LC>
__attribute__((noinline)) void micro(const float* A, const float* B, int T, float* C) {
  V c[MR][NV];
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) c[r][v] = ADD ? load<V>(C + r * LC + v * WIDTH) : V{};
  for (int t = 0; t < T; t++, A += ST, B += LD) {
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = load<V>(B + v * WIDTH);
#pragma GCC unroll 24
    for (int r = 0; r < MR; r++) {
      const V a = broadcast(A[r * SR]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[r][v] = multiply_add(a, b[v], c[r][v]);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(C + r * LC + v * WIDTH, c[r][v]);
}

// The same for any number of rows and N lanes: at most GROUP vectors at a time, the last rows by 8, 4, 2 and 1.
template <int N, int SR, int ST, int LD, bool ADD, int LC = LD>
void product(int rows, const float* A, const float* B, int T, float* C) {
  constexpr int ALL = N / WIDTH, PARTS = (ALL + GROUP - 1) / GROUP, NV = (ALL + PARTS - 1) / PARTS;
  constexpr int M = ROWS * GROUP / NV;
  int r = 0;
  for (; r + M <= rows; r += M) micro<M, NV, SR, ST, LD, ADD, LC>(A + r * SR, B, T, C + r * LC);
  if constexpr (M > 8)
    for (; r + 8 <= rows; r += 8) micro<8, NV, SR, ST, LD, ADD, LC>(A + r * SR, B, T, C + r * LC);
  if constexpr (M > 4)
    if (r + 4 <= rows) micro<4, NV, SR, ST, LD, ADD, LC>(A + r * SR, B, T, C + r * LC), r += 4;
  if (r + 2 <= rows) micro<2, NV, SR, ST, LD, ADD, LC>(A + r * SR, B, T, C + r * LC), r += 2;
  if (r < rows) micro<1, NV, SR, ST, LD, ADD, LC>(A + r * SR, B, T, C + r * LC);
  if constexpr (ALL > NV)
    product<N - NV * WIDTH, SR, ST, LD, ADD, LC>(rows, A, B + NV * WIDTH, T, C + NV * WIDTH);
}

// The same by matrix registers, for multiples of SIDE. Strides of A: LA between rows, NEXT between SIDE units of a row.
template <int N, int LA, int NEXT, int LD, bool ADD, int LC>
void matrices(int rows, const float* A, const float* B, int T, float* C) {
  constexpr int TWO = 2 * SIDE;
  for (int n = 0; n + TWO <= N; n += TWO) {
    int r = 0;
    for (; r + TWO <= rows; r += TWO) matrix<2, 2, LA, NEXT, LD, ADD, LC>(A + r * LA, B + n, T, C + r * LC + n);
    if (r < rows) matrix<1, 2, LA, NEXT, LD, ADD, LC>(A + r * LA, B + n, T, C + r * LC + n);
  }
  if constexpr (constexpr int n = N - SIDE; N % TWO)
    for (int r = 0; r < rows; r += SIDE) matrix<1, 1, LA, NEXT, LD, ADD, LC>(A + r * LA, B + n, T, C + r * LC + n);
}

// C[row][lane] = or += the sum of A[row][unit] B[unit][lane] over T units.
template <int N, int LA, int LD, bool ADD>
void product_of_rows(int rows, const float* A, const float* B, int T, float* C) {
  if constexpr (SQUARE) matrices<N, LA, SIDE, LD, ADD, LD>(rows, A, B, T, C);
  else product<N, LA, 1, LD, ADD>(rows, A, B, T, C);
}

// sums[d][lane] += the sum of sides[key][d] weights[key][lane] over `keys` keys, in the layout of `pack_sides`.
template <int N> void product_of_sides(const float* sides, const float* weights, int keys, float* sums) {
  if constexpr (SQUARE) matrices<N, SIDE, D * SIDE, LANES, true, LANES>(D, sides, weights, keys / UNIT, sums);
  else product<N, 1, D, LANES, true>(D, sides, weights, keys / UNIT, sums);
}

// -- layouts

struct Rows {  // some rows of a view
  ELEMENT* data;
  ptrdiff_t step;
  ELEMENT* operator[](ptrdiff_t i) const { return data + i * step; }
  Rows from(ptrdiff_t i) const { return {data + i * step, step}; }
};

INLINE V unit(const ELEMENT* row, int at) {  // WIDTH units of a row
  if constexpr (PAIRS) return load<V>(row + 2 * at);
  else return widen(row + at);
}

// `count` rows of units, one after another; rows past n are 0.
void pack_rows(Rows from, int n, int count, float* to) {
  for (int i = 0; i < n; i++) {
    if constexpr (PAIRS || std::is_same_v<ELEMENT, float>) memcpy(to + (size_t)i * ROW, from[i], UNITS * 4);
    else
      for (int d = 0; d < D; d += WIDTH) store(to + (size_t)i * D + d, widen(from[i] + d));
    if constexpr (ROW > UNITS) memset(to + (size_t)i * ROW + UNITS, 0, (ROW - UNITS) * 4);
  }
  if (n < count) memset(to + (size_t)n * ROW, 0, (size_t)(count - n) * ROW * 4);
}

// A tile's n rows of units as to[unit][query]; queries past n are 0.
void pack_transposed(Rows from, int n, float* to) {
  for (int i = 0; i < LANES; i += WIDTH)
    for (int next = 0; next < UNITS; next += WIDTH) {
      const int u = std::min(next, UNITS - WIDTH);  // the last ones may be written twice
      V r[WIDTH];
      for (int x = 0; x < WIDTH; x++) r[x] = i + x < n ? unit(from[i + x], u) : V{};
      transpose(r);
      for (int x = 0; x < WIDTH; x++) store(to + (u + x) * LANES + i, r[x]);
    }
  if constexpr (ROW > UNITS) memset(to + UNITS * LANES, 0, (ROW - UNITS) * LANES * 4);
}

// WIDTH units, each the bfloat16 elements of rows i and i + 1 at one index, from index `d` on; rows past n are 0.
INLINE V pair(Rows from, int i, int n, int d) {
  const U even = i < n ? (U)widen(from[i] + d) : U{}, odd = i + 1 < n ? (U)widen(from[i + 1] + d) : U{};
  return (V)(even >> 16 | odd);
}

// `count` rows of bfloat16 as to[row / 2][d]: a unit has an element of each of two rows.
void pack_pairs(Rows from, int n, int count, float* to) {
  for (int i = 0; i < count; i += 2)
    for (int d = 0; d < D; d += WIDTH) store(to + (size_t)i / 2 * D + d, pair(from, i, n, d));
}

// Keys or values in pairs, for sums over keys: to[pair][d], or to[pair / SIDE][d][pair % SIDE] (SQUARE).
void pack_sides(Rows from, int n, float* to) {
  if constexpr (SQUARE) {
    for (int key = 0; key < n; key += STEP, to += D * SIDE)
      for (int d = 0; d < D; d += WIDTH) {
        V r[WIDTH];
        for (int x = 0; x < WIDTH; x++) r[x] = pair(from, key + 2 * x, n, d);
        transpose(r);
        for (int x = 0; x < WIDTH; x++) store(to + (d + x) * SIDE, r[x]);
      }
  } else {
    pack_pairs(from, n, n, to);
  }
}

// Write from[d][query] * factor[query] to a tile's n rows.
void unpack_transposed(const float* from, const float* factor, int n, Rows to) {
  for (int i = 0; i < n; i += WIDTH)
    for (int d = 0; d < D; d += WIDTH) {
      V r[WIDTH];
      for (int x = 0; x < WIDTH; x++) r[x] = load<V>(from + (d + x) * LANES + i) * load<V>(factor + i);
      transpose(r);
      for (int x = 0; x < WIDTH && i + x < n; x++) narrow(to[i + x] + d, r[x]);
    }
}

// A thread's memory, aligned to a cache line.
struct Buffer {
  float* data;
  explicit Buffer(size_t floats) : data((float*)aligned_alloc(64, (floats * 4 + 64) / 64 * 64)) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
};

Rows rows_of(const View& view, int row, int head) {
  return {view.data + row * view.batch + head * view.head, view.row};
}

// The keys or values of a head as units: in place, or copied.
struct Units {
  bool in_place;
  Buffer copy;
  const float* data = nullptr;
  Units(const View& view, int keys) : in_place(stands(view, keys)), copy(in_place ? 0 : up(keys, STEP) * ROW) {}
  void take(Rows rows, int keys) {
    data = in_place ? (const float*)rows.data : copy.data;
    if (!in_place) pack_rows(rows, keys, SQUARE ? up(keys, STEP) : keys, copy.data);
  }

 private:
  // Whether the rows of every head can be read as units in place.
  static bool stands(const View& view, int keys) {
    const int64_t bytes = sizeof(ELEMENT), odd = (int64_t)view.data | view.batch * bytes | view.head * bytes;
    return sizeof(ELEMENT) * UNIT == 4 && view.row == D && odd % 4 == 0 && ROW == UNITS && !(SQUARE && keys % STEP);
  }
};

// -- which keys a tile sees

// Keys [lo, hi) for `queries` queries of the tile from `first` on.
struct Segment {
  int lo, hi, first, queries;
};

// Keys of a segment: [.., whole) and [end, ..) are seen by some of the queries, [whole, end) by all.
struct Cut {
  int whole, end;
};

// Keys come in units, of two keys where bfloat16 is summed over them: all bounds are multiples of STEP.
struct Tile {
  alignas(64) int32_t lo[LANES], count[LANES];
  Segment segments[3];
  int n, used;

  void take(const int32_t* from, const int32_t* to, int queries) {
    n = std::min(LANES, queries);
    for (int i = 0; i < LANES; i++) {
      const int at = std::min(i, n - 1);  // results past the end are not written
      lo[i] = from[at], count[i] = std::max(0, to[at] - from[at]);
    }
    constexpr int HALF = LANES / 2;
    const int a = from[0] / STEP * STEP, c = up(to[std::min(HALF, n) - 1], STEP);
    const bool second = n > HALF;
    const int b = second ? from[HALF] / STEP * STEP : c, d = second ? up(to[n - 1], STEP) : c;
    used = 0;
    // Both halves of the queries against the keys that both see; each half alone against what only it sees.
    add(a, std::min(b, c), 0, HALF), add(b, c, 0, LANES), add(std::max(b, c), d, HALF, HALF);
  }
  int first() const { return used ? segments[0].lo : 0; }
  int last() const { return used ? segments[used - 1].hi : 0; }

  Cut cut(int begin, int end, int first, int queries) const {
    const int whole = std::clamp((int)up(lo[first + queries - 1], UNIT), begin, end);
    return {whole, std::clamp((lo[first] + count[first]) / UNIT * UNIT, whole, end)};
  }
  INLINE V seen(int key, int query, V x, V otherwise) const {  // x where key - lo < count, and not below 0
    return (U)(key - load<I>(lo + query)) < load<U>(count + query) ? x : otherwise;
  }

 private:
  void add(int begin, int end, int first, int queries) {
    if (begin < end) segments[used++] = {begin, end, first, queries};
  }
};

// Calls block<queries>(first key, keys, first query) for equal parts of the tile's keys.
template <class Worker> void walk(Worker& worker, const Tile& tile) {
  for (int s = 0; s < tile.used; s++) {
    const Segment& part = tile.segments[s];
    const int length = part.hi - part.lo, blocks = (length + BLOCK - 1) / BLOCK;
    const int step = up((length + blocks - 1) / blocks, SQUARE ? STEP : ROWS);
    for (int key = part.lo; key < part.hi; key += step) {
      const int count = std::min(step, part.hi - key);
      if (part.queries == LANES) worker.template block<LANES>(key, count, part.first);
      else worker.template block<LANES / 2>(key, count, part.first);
    }
  }
}

// Turn scores <q, k> into softcap tanh(scale <q, k> / softcap), whose scale is 1.
void apply_softcap(const Call& call, int keys, float* scores) {
  for (float* at = scores; at < scores + keys * LANES; at += WIDTH)
    store(at, call.softcap * tanh(load<V>(at) * (call.scale / call.softcap)));
}

// ALiBi (arXiv 2108.12409, section 3): subtract slope (i - j) from a tile's scores, for `queries` queries from the
// position `i` on, and keys from `j` on. Scores of keys that are not seen may rise.
void subtract_alibi(float slope, int i, int queries, int j, int keys, float* scores) {
  V index;
  for (int x = 0; x < WIDTH; x++) index[x] = x;
  for (int key = 0; key < keys; key++)
    for (int x = 0; x < queries; x += WIDTH) {
      float* at = scores + key * LANES + x;
      store(at, load<V>(at) - slope * (index + (float)(i + x - j - key)));
    }
}

// -- forward: a task is one query head of one batch entry (`row`)

struct Forward {
  const Call& call;
  const float scale;  // of the scores after `apply_softcap`
  alignas(64) float qt[ROW * LANES], scores[BLOCK * LANES], pairs[BLOCK * LANES / 2], mixed[D * LANES];
  alignas(64) float peak[LANES], total[LANES];
  Tile tile;
  Units k, v;
  Buffer paired;
  const float* values = nullptr;
  float alibi = 0;   // the head's slope, in units of the scores before `scale`
  int position = 0;  // of the tile's first query

  explicit Forward(const Call& c)
      : call(c),
        scale(c.softcap ? 1 : c.scale),
        k(c.k, c.keys),
        v(c.v, PAIRS ? 0 : c.keys),
        paired(PAIRS ? up(c.keys, STEP) / UNIT * D : 0) {}

  static int tasks(const Call& c) { return c.batch * c.heads; }

  void run(int task) {
    const int row = task / call.heads, head = task % call.heads, kv = head / (call.heads / call.kv_heads);
    k.take(rows_of(call.k, row, kv), call.keys);
    if constexpr (PAIRS) pack_sides(rows_of(call.v, row, kv), call.keys, paired.data);
    else v.take(rows_of(call.v, row, kv), call.keys);
    values = PAIRS ? paired.data : v.data;
    const Rows q = rows_of(call.q, row, head), out = rows_of(call.out, row, head);
    const size_t bounds = (size_t)row * call.queries;
    if (call.slopes) alibi = call.slopes[head] / scale;
    for (int i = 0; i < call.queries; i += LANES) {
      tile.take(call.lo + bounds + i, call.hi + bounds + i, call.queries - i);
      position = call.keys - call.queries + i;
      pack_transposed(q.from(i), tile.n, qt);
      memset(mixed, 0, sizeof mixed);
      for (int x = 0; x < LANES; x++) peak[x] = LOWEST, total[x] = 0;
      walk(*this, tile);
      finish(out.from(i), call.lse + (size_t)task * call.queries + i);
    }
  }

  template <int QUERIES> void block(int key, int keys, int first) {
    const int read = SQUARE ? keys : std::min(keys, call.keys - key);
    product_of_rows<QUERIES, ROW, LANES, false>(read, k.data + (size_t)key * ROW, qt + first, ROW, scores);
    if (call.softcap) apply_softcap(call, keys, scores);
    if (call.slopes) subtract_alibi(alibi, position + first, QUERIES, key, keys, scores);
    const Cut cut = tile.cut(key, key + keys, first, QUERIES);
    constexpr int NV = std::min(GROUP, QUERIES / WIDTH);
    for (int x = 0; x < QUERIES; x += NV * WIDTH) softmax<NV>(key, keys, cut, first, x);
    product_of_sides<QUERIES>(values + (size_t)key / UNIT * D, PAIRS ? pairs : scores, keys, mixed + first);
  }

  // Turn scores into weights 2^(scale s - peak), for NV vectors of queries from first + x on; rescale the sums so far.
  template <int NV> INLINE void softmax(int key, int keys, Cut cut, int first, int x) {
    const int begin[4] = {key, cut.whole, cut.end, key + keys};
    const V scale2 = broadcast(scale * LOG2E);
    V highest[NV], sum[NV] = {};
    for (V& h : highest) h = broadcast(-INFINITY);
    row_max<NV, true>(key, begin[0], begin[1], first, x, highest);
    row_max<NV, false>(key, begin[1], begin[2], first, x, highest);
    row_max<NV, true>(key, begin[2], begin[3], first, x, highest);
    for (int y = 0; y < NV; y++) highest[y] = max(load<V>(peak + first + x + y * WIDTH), highest[y] * scale2);
    weigh<NV, true>(key, begin[0], begin[1], first, x, scale2, highest, sum);
    weigh<NV, false>(key, begin[1], begin[2], first, x, scale2, highest, sum);
    weigh<NV, true>(key, begin[2], begin[3], first, x, scale2, highest, sum);
    for (int y = 0; y < NV; y++) rescale(first + x + y * WIDTH, highest[y], sum[y]);
  }

  // highest = max over the keys [begin, end) of the block that starts at `key`.
  template <int NV, bool EDGE> INLINE void row_max(int key, int begin, int end, int first, int x, V* highest) {
    V m[NV];
    for (int y = 0; y < NV; y++) m[y] = highest[y];
    for (int j = begin; j < end; j++)
      for (int y = 0; y < NV; y++) {
        const int at = x + y * WIDTH;
        const V higher = max(m[y], load<V>(scores + (j - key) * LANES + at));
        m[y] = EDGE ? tile.seen(j, first + at, higher, m[y]) : higher;
      }
    for (int y = 0; y < NV; y++) highest[y] = m[y];
  }

  // Weights, in place, or as bfloat16 in pairs of keys; and their sums.
  template <int NV, bool EDGE>
  INLINE void weigh(int key, int begin, int end, int first, int x, V scale2, const V* m, V* sums) {
    V sum[NV];
    for (int y = 0; y < NV; y++) sum[y] = sums[y];
    for (int j = begin; j < end; j += UNIT)
      for (int y = 0; y < NV; y++) {
        V p[UNIT];
        for (int u = 0; u < UNIT; u++) {
          float* at = scores + (j + u - key) * LANES + x + y * WIDTH;
          p[u] = exp2(load<V>(at) * scale2 - m[y]);
          if (EDGE) p[u] = tile.seen(j + u, first + x + y * WIDTH, p[u], V{});
          sum[y] += p[u];
          if constexpr (!PAIRS) store(at, p[u]);
        }
        if constexpr (PAIRS) store(pairs + (j - key) / 2 * LANES + x + y * WIDTH, zipped(p[0], p[1]));
      }
    for (int y = 0; y < NV; y++) sums[y] = sum[y];
  }

  INLINE void rescale(int query, V highest, V sum) {
    const V before = load<V>(peak + query), decay = exp2(before - highest);
    store(total + query, load<V>(total + query) * decay + sum);
    if (any(before != highest))
      for (float* at = mixed + query; at < mixed + D * LANES; at += LANES) store(at, load<V>(at) * decay);
    store(peak + query, highest);
  }

  // A query that sees no key has the sum 0: its output is 0, its log-sum-exp -inf.
  void finish(Rows out, float* lse) {
    alignas(64) float inverse[LANES];
    for (int i = 0; i < LANES; i++) inverse[i] = total[i] > 0 ? 1 / total[i] : 0;
    unpack_transposed(mixed, inverse, tile.n, out);
    for (int i = 0; i < tile.n; i++) lse[i] = LN2 * (peak[i] + log2f(total[i]));
  }
};

// -- decode: few queries over many keys, so a task is a part of the keys of one key-value head

// `queries` counts a query for each head of the group, token by token. Here the lanes are the elements of a head, so a
// score is a vector's sum over its lanes, and values are read in their own layout.
struct Decode {
  static constexpr int PART = 1024, KEYS = 64, MOST = 16;  // keys of a task, of a block; queries at a time
  static constexpr int VECTORS = (UNITS + WIDTH - 1) / WIDTH, STATE = D + 2;
  const Call& call;
  float* const states;  // of each task and query: mixed (D), peak, total
  alignas(64) float q[MOST][VECTORS * WIDTH], scores[MOST][KEYS], values[KEYS * UNITS];
  V products[MOST][WIDTH];

  Decode(const Call& c, float* of_tasks) : call(c), states(of_tasks) {}

  static int parts(const Call& c) { return (c.keys + PART - 1) / PART; }
  static int tasks(const Call& c) { return c.batch * c.kv_heads * parts(c); }

  void run(int task) {
    const int head = task / parts(call), row = head / call.kv_heads, kv = head % call.kv_heads;
    const int first = task % parts(call) * PART, last = std::min(first + PART, call.keys);
    const Rows queries = rows_of(call.q, row, kv), k = rows_of(call.k, row, kv), v = rows_of(call.v, row, kv);
    for (int i = 0; i < call.queries; i += MOST) {
      const int n = std::min(MOST, call.queries - i);
      float* state = states + ((size_t)task * call.queries + i) * STATE;
      for (int r = 0; r < n; r++) {
        load_query(queries[i + r], q[r]);
        std::fill(state + r * STATE, state + (r + 1) * STATE, 0.0f), state[r * STATE + D] = LOWEST;
      }
      for (int key = first; key < last; key += KEYS)
        block(k.from(key), v.from(key), key, std::min(KEYS, last - key), row * call.queries + i, n, state);
    }
  }

 private:
  // Where the last vector begins before the end of the one before it, its first lanes are 0.
  static int begin(int vector) { return std::min(vector * WIDTH, UNITS - WIDTH); }
  static void load_query(const ELEMENT* from, float* to) {
    for (int x = 0; x < VECTORS; x++) {
      store(to + x * WIDTH, unit(from, begin(x)));
      std::fill(to + x * WIDTH, to + x * WIDTH + (x * WIDTH - begin(x)), 0.0f);
    }
  }

  static void fetch(const ELEMENT* row) {  // into the L1 cache
    for (int d = 0; d < D; d += 64 / sizeof(ELEMENT)) __builtin_prefetch(row + d);
  }

  void block(Rows k, Rows v, int key, int keys, int i, int n, float* state) {
    for (int j = 0; j < keys; j += WIDTH) {
      for (int x = 0; x < WIDTH; x++) {
        fetch(k[j + x + KEYS]), fetch(v[j + x]);
        V of_key[VECTORS];
        for (int y = 0; y < VECTORS; y++) of_key[y] = unit(k[std::min(j + x, keys - 1)], begin(y));
        for (int r = 0; r < n; r++) {
          V sum{};
          for (int y = 0; y < VECTORS; y++) sum = multiply_add(of_key[y], load<V>(q[r] + y * WIDTH), sum);
          products[r][x] = sum;
        }
      }
      for (int r = 0; r < n; r++) store(scores[r] + j, sums(products[r]));
    }
    const int used = (keys + WIDTH - 1) / WIDTH * WIDTH;
    for (int r = 0; r < n; r++) {
      const int token = (i + r) / (call.heads / call.kv_heads);
      softmax(scores[r], key, used, call.lo[token], call.hi[token], state + r * STATE);
    }
    const bool stand = std::is_same_v<ELEMENT, float> && v.step == D;
    if constexpr (PAIRS) pack_pairs(v, keys, keys, values);
    else if (!stand) pack_rows(v, keys, keys, values);
    const float* rows = stand ? (const float*)v.data : values;
    product<D, KEYS, 1, D, true, STATE>(n, scores[0], rows, (keys + UNIT - 1) / UNIT, state);
  }

  // Turn a query's scores into weights, for bfloat16 in pairs; rescale what was summed so far to the new peak.
  void softmax(float* scores, int key, int keys, int lo, int hi, float* state) {
    I index;
    for (int i = 0; i < WIDTH; i++) index[i] = i;
    V highest = broadcast(LOWEST), sum{};
    for (int j = 0; j < keys; j += WIDTH) {
      V s = load<V>(scores + j) * call.scale;
      if (call.softcap) s = call.softcap * tanh(s / call.softcap);
      s = (U)(index + (key + j - lo)) < broadcast((uint32_t)std::max(0, hi - lo)) ? s * LOG2E : broadcast(-INFINITY);
      store(scores + j, s), highest = max(highest, s);
    }
    float peak = state[D];
    for (int i = 0; i < WIDTH; i++) peak = std::max(peak, highest[i]);
    const float decay = exp2f(state[D] - peak);
    for (int j = 0; j < keys; j += WIDTH) {
      const V p = exp2(load<V>(scores + j) - peak);
      sum += p, store(scores + j, p);
    }
    float total = state[D + 1] * decay;
    for (int i = 0; i < WIDTH; i++) total += sum[i];
    if (decay != 1)
      for (int d = 0; d < D; d++) state[d] *= decay;
    state[D] = peak, state[D + 1] = total;
    if constexpr (PAIRS)
      for (int j = 0; j < keys; j += 2 * WIDTH)
        store(scores + j / 2, joined(load<V>(scores + j), load<V>(scores + j + WIDTH)));
  }
};

// Merge the states of a head's parts, in their order, into the output and the log-sum-exp of a query.
void merge(const Call& call, const float* states, int head, int query) {
  const int row = head / call.kv_heads, parts = Decode::parts(call);
  const float* state = states + ((size_t)head * parts * call.queries + query) * Decode::STATE;
  float mixed[D] = {}, peak = LOWEST, total = 0;
  for (int part = 0; part < parts; part++, state += (size_t)call.queries * Decode::STATE) {
    const float highest = std::max(peak, state[D]), decay = exp2f(peak - highest), added = exp2f(state[D] - highest);
    for (int d = 0; d < D; d++) mixed[d] = mixed[d] * decay + state[d] * added;
    total = total * decay + state[D + 1] * added, peak = highest;
  }
  ELEMENT* out = rows_of(call.out, row, head % call.kv_heads)[query];
  for (int d = 0; d < D; d += WIDTH) narrow(out + d, load<V>(mixed + d) * (total > 0 ? 1 / total : 0));
  call.lse[(size_t)head * call.queries + query] = LN2 * (peak + log2f(total));
}

// -- backward: a task is one key-value head of one batch entry (`row`)

// A gradient of keys or values, summed in float32: in place if possible, else in a buffer that moves on with the tiles.
struct Sum {
  bool in_place;
  int room, keys, base = 0, end = 0;  // rows [base, end) are held
  Buffer held;
  Rows into{};
  float* data = nullptr;

  Sum(const View& view, int widest, int all)
      : in_place(std::is_same_v<ELEMENT, float> && view.row == D),
        room(in_place ? all : std::min(all, widest + SLACK)),
        keys(all),
        held(in_place ? 0 : (size_t)(room + STEP) * D) {}  // sums may be added past the last key

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
      for (int d = 0; d < D; d += WIDTH) narrow(into[key] + d, key < end ? load<V>(at(key) + d) : V{});
  }
};

struct Backward {
  const Call& call;
  alignas(64) float qt[ROW * LANES], gt[ROW * LANES];       // queries and output gradients, [unit][query]
  alignas(64) float q[UNITS * LANES], grad[UNITS * LANES];  // the same as the lanes of dk and dv, [query][d]
  alignas(64) float dqt[D * LANES], lse[LANES], delta[LANES];
  alignas(64) float weights[BLOCK * LANES], slopes[BLOCK * LANES];  // P and dS, [key][query]
  alignas(64) float narrow_weights[BLOCK * LANES / 2], narrow_slopes[BLOCK * LANES / 2], slope_pairs[BLOCK * LANES / 2];
  Tile tile;
  Units k, v;
  Buffer paired;  // keys in pairs, for dq in bfloat16
  Sum dk, dv;
  float alibi = 0;  // as in Forward
  int position = 0;

  explicit Backward(const Call& c)
      : call(c),
        k(c.k, c.keys),
        v(c.v, c.keys),
        paired(PAIRS ? up(c.keys, STEP) / UNIT * D : 0),
        dk(c.dk, widest(c), c.keys),
        dv(c.dv, widest(c), c.keys) {}

  static int tasks(const Call& c) { return c.batch * c.kv_heads; }

  // The most keys that a tile sees, and up to STEP - 1 on either side.
  static int widest(const Call& c) {
    int most = 0;
    for (int row = 0; row < c.batch; row++)
      for (int i = 0; i < c.queries; i += LANES) {
        const size_t first = (size_t)row * c.queries + i, last = first + std::min(LANES, c.queries - i) - 1;
        most = std::max(most, c.hi[last] - c.lo[first]);
      }
    return most + 2 * (STEP - 1);
  }

  void run(int task) {
    const int row = task / call.kv_heads, kv = task % call.kv_heads, group = call.heads / call.kv_heads;
    const size_t bounds = (size_t)row * call.queries;
    k.take(rows_of(call.k, row, kv), call.keys), v.take(rows_of(call.v, row, kv), call.keys);
    if constexpr (PAIRS) pack_sides(rows_of(call.k, row, kv), call.keys, paired.data);
    dk.take(rows_of(call.dk, row, kv)), dv.take(rows_of(call.dv, row, kv));
    for (int i = 0; i < call.queries; i += LANES) {
      tile.take(call.lo + bounds + i, call.hi + bounds + i, call.queries - i);
      if (tile.used) dk.reach(tile.first(), tile.last()), dv.reach(tile.first(), tile.last());
      for (int head = kv * group; head < (kv + 1) * group; head++) {
        take(row, head, i);
        walk(*this, tile);
        float one[LANES];
        std::fill(one, one + LANES, 1.0f);
        unpack_transposed(dqt, one, tile.n, rows_of(call.dq, row, head).from(i));
      }
    }
    dk.finish(), dv.finish();
  }

  // Load a tile's queries, output gradients, log-sum-exps in base 2, and delta = scale (<out, grad> - dlse).
  void take(int row, int head, int i) {
    const Rows queries = rows_of(call.q, row, head).from(i), gradients = rows_of(call.grad, row, head).from(i),
               out = rows_of(call.out, row, head).from(i);
    pack_transposed(queries, tile.n, qt), pack_transposed(gradients, tile.n, gt);
    if constexpr (PAIRS) pack_pairs(queries, tile.n, LANES, q), pack_pairs(gradients, tile.n, LANES, grad);
    else pack_rows(queries, tile.n, LANES, q), pack_rows(gradients, tile.n, LANES, grad);
    memset(dqt, 0, sizeof dqt);
    if (call.slopes) alibi = call.slopes[head] / call.scale;
    position = call.keys - call.queries + i;
    const size_t at = ((size_t)row * call.heads + head) * call.queries + i;
    for (int x = 0; x < LANES; x++) {
      lse[x] = INFINITY, delta[x] = 0;  // the weight 0, for queries past the end or without a key
      if (x >= tile.n || tile.count[x] == 0) continue;
      V products = {};
      for (int d = 0; d < D; d += WIDTH) products += widen(gradients[x] + d) * widen(out[x] + d);
      float sum = 0;
      for (int y = 0; y < WIDTH; y++) sum += products[y];
      lse[x] = call.lse[at + x] * LOG2E;
      delta[x] = call.scale * (sum - call.dlse[at + x]);
    }
  }

  template <int QUERIES> void block(int key, int keys, int first) {
    const int read = SQUARE ? keys : std::min(keys, call.keys - key);
    product_of_rows<QUERIES, ROW, LANES, false>(read, k.data + (size_t)key * ROW, qt + first, ROW, weights);
    product_of_rows<QUERIES, ROW, LANES, false>(read, v.data + (size_t)key * ROW, gt + first, ROW, slopes);
    if (call.softcap) apply_softcap(call, keys, weights);
    if (call.slopes) subtract_alibi(alibi, position + first, QUERIES, key, keys, weights);
    const Cut cut = tile.cut(key, key + keys, first, QUERIES);
    differentiate<QUERIES, true>(key, key, cut.whole, first);
    differentiate<QUERIES, false>(key, cut.whole, cut.end, first);
    differentiate<QUERIES, true>(key, cut.end, key + keys, first);
    const float *p = PAIRS ? narrow_weights : weights, *ds = PAIRS ? narrow_slopes : slopes;
    const size_t own = (size_t)first / UNIT * D;
    product_of_rows<D, LANES / UNIT, D, true>(read, p, grad + own, QUERIES / UNIT, dv.at(key));
    product_of_rows<D, LANES / UNIT, D, true>(read, ds, q + own, QUERIES / UNIT, dk.at(key));
    const float* sides = (PAIRS ? paired.data : k.data) + (size_t)key / UNIT * D;
    product_of_sides<QUERIES>(sides, PAIRS ? slope_pairs : slopes, keys, dqt + first);
  }

  // P = 2^(scale s - lse) and dS = P (scale dP - delta): in place, or in bfloat16 by rows, and dS by pairs of keys too.
  template <int QUERIES, bool EDGE> INLINE void differentiate(int key, int begin, int end, int first) {
    const float scale = call.scale, scale2 = (call.softcap ? 1 : scale) * LOG2E;
    const float capped = call.softcap ? 1 / (call.softcap * call.softcap) : 0;
    for (int j = begin; j < end; j += UNIT)
      for (int x = 0; x < QUERIES; x += 2 * WIDTH) {
        V p[UNIT][2], ds[UNIT][2];
        for (int u = 0; u < UNIT; u++)
          for (int y = 0; y < 2; y++) {
            const int own = first + x + y * WIDTH, at = (j + u - key) * LANES + x + y * WIDTH;
            const V score = load<V>(weights + at);
            p[u][y] = exp2(score * scale2 - load<V>(lse + own));
            ds[u][y] = p[u][y] * (load<V>(slopes + at) * scale - load<V>(delta + own));
            if (capped) ds[u][y] *= 1 - score * score * capped;  // the slope of `apply_softcap`
            if (EDGE) p[u][y] = tile.seen(j + u, own, p[u][y], V{}), ds[u][y] = tile.seen(j + u, own, ds[u][y], V{});
            if constexpr (!PAIRS) store(weights + at, p[u][y]), store(slopes + at, ds[u][y]);
          }
        if constexpr (PAIRS)
          for (int u = 0; u < 2; u++) {
            const int row = (j + u - key) * LANES / 2 + x / 2, pair = (j - key) / 2 * LANES + x + u * WIDTH;
            store(narrow_weights + row, joined(p[u][0], p[u][1]));
            store(narrow_slopes + row, joined(ds[u][0], ds[u][1]));
            store(slope_pairs + pair, zipped(ds[0][u], ds[1][u]));
          }
      }
  }
};

// -- tasks in threads

// Run all tasks; return 0, or 1 if no thread had memory. Each task runs in one thread, so the number of threads does
// not change the result.
template <class Worker, class... Shared> int in_threads(const Call& call, Shared... shared) {
  const int tasks = Worker::tasks(call);
  std::atomic<int> next{0}, working{0};
  auto work = [&] {
    try {
      auto worker = std::make_unique<Worker>(call, shared...);
      [[maybe_unused]] const std::conditional_t<SQUARE, Matrices, int> registers{};
      working++;
      for (int task; (task = next++) < tasks;) worker->run(task);
    } catch (const std::bad_alloc&) {  // the other threads take its tasks
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < std::min(call.threads, tasks); i++) helpers.emplace_back(work);
  } catch (...) {  // fewer threads will do
  }
  work();
  for (auto& helper : helpers) helper.join();
  return working == 0;
}

}  // namespace

extern "C" {
int forward(const Call* call) { return in_threads<Forward>(*call); }
int backward(const Call* call) { return in_threads<Backward>(*call); }
int decode(const Call* call) {
  const int heads = call->batch * call->kv_heads;
  std::vector<float> states;
  try {
    states.resize((size_t)Decode::tasks(*call) * call->queries * Decode::STATE);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  if (in_threads<Decode>(*call, states.data())) return 1;
  for (int i = 0; i < heads * call->queries; i++) merge(*call, states.data(), i / call->queries, i % call->queries);
  return 0;
}
const char* instructions() { return NAME; }
bool dots() { return DOTS; }
bool matrices() { return SQUARE; }
bool permitted() { return !SQUARE || permit_matrices(); }
}
