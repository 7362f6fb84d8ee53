// The matrix products of a net on weights in panels (iin_fast/ops/flow/layout.py), or in blocks of a panel's width.
//
//   multiply_panel   C[rows, panel] = act(A[rows, k] W[k, panel] + bias), or C = mask' * (A W), see Finish
//   outer_product    dW[k, panel] (+)= A[rows, k]^T dC[rows, panel]
//   transpose_panel  a piece of a panel turned, so that multiply_panel also computes dA = dC W^T
//
// Activations are row-major with rows padded to whole vectors (row_stride()), so a product may write the padding; a
// panel is not padded: a vector that reaches beyond its row reads the next row, whose lanes are dropped, and only the
// last rows of the last panel are read from a copy. All loops are register tiles of R rows x C vectors; R and C are
// chosen for 32 or 16 vector registers. Tuned on AVX-512 (Zen 4 and 5) at hidden 512, batch 25 and 256:
// docs/performance.md.
#pragma once

#include "common/simd.h"
#include "flow/flow.h" // panel_width

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// What happens to a sum when it is complete.
enum class Finish {
  store,     // c = sum
  leaky,     // c = sum > 0 ? sum : slope * sum
  mask,      // c = mask > 0 ? sum : slope * sum, the derivative of the above at the activation `mask`
  relu,      // c = sum < 0 ? 0 : sum
  relu_mask, // c = mask <= 0 ? 0 : sum, its derivative
};

template <class T> struct Product {
  const T *a; // [rows, k], row stride lda
  int64_t lda;
  const T *w; // [k, columns], row stride ldw
  int64_t ldw, k;
  T *c; // [rows, columns], row stride ldc
  int64_t ldc;
  const T *start; // [columns] added to the product; null: c holds the sum over earlier k
  Finish finish;
  T slope;
  const T *mask; // [rows, columns], row stride ldmask
  int64_t ldmask;
  const char *ahead;  // weights that are needed next: a tile asks for them line by line as it goes, since asked for at
                      // once they would stall the core; any address is allowed
  int64_t ahead_step; // bytes from one k to the next, for Ahead::share
};

// How a tile asks for weights that are needed next.
enum class Ahead {
  nothing,
  line,  // one cache line at every k, into the second cache
  half,  // half as many as it reads itself
  all,   // as many
  share, // `ahead_step` bytes at every k, into the first cache
};

// Cache lines of weights that a tile of C vectors reads at every k.
template <int C> constexpr int line_rate = C * vector_bytes > 64 ? C * vector_bytes / 64 : 1;

template <class T, int R, int C, Ahead asks> void multiply_tile(const Product<T> &p) {
  constexpr int n = lanes<T>;
  constexpr int count = asks == Ahead::nothing ? 0 // lines of `ahead` at every k
                        : asks == Ahead::half  ? (line_rate<C> + 1) / 2
                        : asks == Ahead::all   ? line_rate<C>
                                               : 1;
  constexpr int cache = asks == Ahead::share || (asks == Ahead::all && count > 1) ? 3 : 2; // the first or the second
  vec<T> sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      sum[r][c] = p.start ? load(p.start + c * n) : load(p.c + r * p.ldc + c * n);
  const T *a = p.a, *w = p.w;
  const char *ahead = p.ahead;
  const int64_t lda = p.lda, ldw = p.ldw, ahead_step = asks == Ahead::share ? p.ahead_step : count * 64;
  for (int64_t k = p.k; k > 0; --k) {
    vec<T> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      b[c] = load(w + c * n);
#pragma GCC unroll 4
    for (int line = 0; line < count; ++line)
      __builtin_prefetch(ahead + line * 64, 0, cache);
    ahead += ahead_step;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec<T> value = broadcast(a[r * lda]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] += value * b[c];
    }
    ++a;
    w += ldw;
  }
  const vec<T> zero{}, slope = broadcast(p.slope);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      vec<T> v = sum[r][c];
      if (p.finish == Finish::leaky)
        v = v > zero ? v : slope * v;
      else if (p.finish == Finish::mask)
        v = load(p.mask + r * p.ldmask + c * n) > zero ? v : slope * v;
      else if (p.finish == Finish::relu)
        v = v < zero ? zero : v;
      else if (p.finish == Finish::relu_mask)
        v = load(p.mask + r * p.ldmask + c * n) <= zero ? zero : v;
      store(p.c + r * p.ldc + c * n, v);
    }
}

template <class T> struct Outer {
  const T *a; // [rows, k], row stride lda
  int64_t lda;
  const T *d; // [rows, columns], row stride ldd
  int64_t ldd, rows;
  T *w; // [k, columns], row stride ldw
  int64_t ldw;
  int64_t columns; // at most C vectors
  bool add;        // to what w holds
  bool past;       // store past the caches (stream), where whole cache lines are written
};

template <class T, int R, int C> void outer_tile(const Outer<T> &p) {
  constexpr int n = lanes<T>;
  vec<T> sum[R][C] = {};
  const T *a = p.a, *d = p.d;
  const int64_t lda = p.lda, ldd = p.ldd;
  for (int64_t row = p.rows; row > 0; --row) {
    vec<T> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      b[c] = load(d + c * n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec<T> value = broadcast(a[r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] += value * b[c];
    }
    a += lda;
    d += ldd;
  }
  constexpr int line = 64;
  const bool lines = C * vector_bytes % line == 0 && (reinterpret_cast<uintptr_t>(p.w) | p.ldw * sizeof(T)) % line == 0;
  if (p.past && lines && !p.add && p.columns >= C * n) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        stream(p.w + r * p.ldw + c * n, sum[r][c]);
    return;
  }
  if (p.columns >= C * n) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        T *w = p.w + r * p.ldw + c * n;
        store(w, p.add ? load(w) + sum[r][c] : sum[r][c]);
      }
    return;
  }
  alignas(64) T rows[R * C * n]; // a tail goes through memory, so that the sums can stay in registers
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      store(rows + (r * C + c) * n, sum[r][c]);
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < p.columns; ++j)
      p.w[r * p.ldw + j] = (p.add ? p.w[r * p.ldw + j] : T(0)) + rows[r * C * n + j];
}

// Register tiles: for C vectors a tile has at most max_rows(C) rows.
constexpr int max_columns = vector_registers == 32 ? 4 : 2;
constexpr int max_rows(int columns) {
  return vector_registers == 32 ? (columns == 4   ? 6
                                   : columns == 3 ? 8
                                   : columns == 2 ? 12
                                                  : 14)
                                : (columns == 2 ? 6 : 8);
}

// A division takes as long as a tile of few rows does at two k.
IIN_FAST_INLINE int64_t divided(int64_t a, int64_t b) { return b == 1 ? a : a / b; }
IIN_FAST_INLINE int64_t tiles_of(int64_t rows, int64_t columns) {
  const int64_t most = max_rows(static_cast<int>(columns));
  return rows <= most ? 1 : ceil_div(rows, most);
}

template <class T> using MultiplyTile = void (*)(const Product<T> &);
template <class T> using OuterTile = void (*)(const Outer<T> &);

template <class T, int C, int... R>
MultiplyTile<T> multiply_of(int64_t rows, Ahead asks, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile<T> tiles[5][sizeof...(R)] = {
      {multiply_tile<T, R + 1, C, Ahead::nothing>...}, {multiply_tile<T, R + 1, C, Ahead::line>...},
      {multiply_tile<T, R + 1, C, Ahead::half>...},    {multiply_tile<T, R + 1, C, Ahead::all>...},
      {multiply_tile<T, R + 1, C, Ahead::share>...},
  };
  return tiles[static_cast<int>(asks)][rows - 1];
}

template <class T, int C, int... R> OuterTile<T> outer_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr OuterTile<T> tiles[] = {outer_tile<T, R + 1, C>...};
  return tiles[rows - 1];
}

template <class T, int C = max_columns> MultiplyTile<T> multiply_with(int64_t rows, int64_t columns, Ahead asks) {
  if constexpr (C > 1)
    if (columns < C)
      return multiply_with<T, C - 1>(rows, columns, asks);
  return multiply_of<T, C>(rows, asks, std::make_integer_sequence<int, max_rows(C)>());
}

template <class T, int C = max_columns> OuterTile<T> outer_with(int64_t rows, int64_t columns) {
  if constexpr (C > 1)
    if (columns < C)
      return outer_with<T, C - 1>(rows, columns);
  return outer_of<T, C>(rows, std::make_integer_sequence<int, max_rows(C)>());
}

// How far ahead a lone tile asks.
constexpr int64_t stream_bytes = 6 * 1024;

// Rows from which on every tile asks.
constexpr int64_t shared_rows = 20;

// Bytes of W that a block of k may hold. A tile loads and stores its sums once in each. With many rows the block is in
// the second cache after the first tile; with few it is read as it comes, and what is asked for must not come too
// early.
inline int64_t block_bytes(int64_t rows) { return (rows >= shared_rows ? 128 : 32) * 1024; }

// C[rows, columns] of one panel. `readable`: whether a vector may be read that begins in any row of w and ends beyond
// it, i.e. whether w is padded. Where a panel is wider than a tile, a block of k meets all columns before the next one
// comes: it is one run of memory.
template <class T> void multiply_panel(const Product<T> &whole, int64_t rows, int64_t columns, bool readable) {
  constexpr int n = lanes<T>;
  constexpr int64_t widest = max_columns * n;
  alignas(64) T tail[n * widest]; // the last rows of w, padded
  alignas(64) T start[widest];
  const int64_t groups = ceil_div(columns, widest);
  const int64_t calls = groups * tiles_of(rows, smaller(ceil_div(columns, n), max_columns));
  const int64_t width_of_all = groups == 1 ? ceil_div(columns, n) * n : columns;
  const int64_t block = calls == 1 ? whole.k : larger(16, block_bytes(rows) / (width_of_all * (int64_t)sizeof(T)));
  // What comes next, while this block is computed: for many rows each tile asks for its share; for fewer, where that
  // would take the place of what they read, four tiles ask for a quarter each; a lone tile asks for its own weights, as
  // far ahead as a core has in flight to memory several times.
  const int64_t asking = rows >= shared_rows ? calls : calls >= 4 ? 4 : smaller(calls, 2);
  const Ahead way = rows >= shared_rows ? Ahead::share
                    : asking == 4       ? Ahead::line
                    : asking == 2       ? Ahead::half
                                        : Ahead::all;
  const int64_t stride = divided(calls, asking);
  for (int64_t k = 0; k < whole.k; k += block) {
    const int64_t end_k = smaller(k + block, whole.k), bytes = (end_k - k) * whole.ldw * sizeof(T);
    const char *const ahead =
        !readable ? reinterpret_cast<const char *>(whole.w + k * whole.ldw) + (calls == 1 ? stream_bytes : bytes)
                  : whole.ahead;
    const int64_t share = divided(bytes + asking - 1, asking);
    int64_t asked = 0, silent = 0; // tiles that asked; those to come before the next does
    for (int64_t column = 0; column < columns; column += widest) {
      const int64_t vectors = smaller(ceil_div(columns - column, n), max_columns), width = vectors * n;
      const int64_t beyond = readable ? 0 : larger(column + width - columns, 0);
      const int64_t direct = whole.k - (beyond ? smaller(ceil_div(beyond, whole.ldw), whole.k) : 0);
      const T *first = k > 0 || whole.start == nullptr ? nullptr : whole.start + column;
      if (first != nullptr && column + width > columns) {
        for (int64_t j = 0; j < width; ++j)
          start[j] = column + j < columns ? first[j] : T(0);
        first = start;
      }
      const int64_t tiles = tiles_of(rows, vectors), height = divided(rows, tiles), taller = rows - height * tiles;
      // the rows of w from k to `to`, in place or in the tail
      const auto run = [&](int64_t from, int64_t to, const T *w, int64_t ldw, const T *begin) {
        Product<T> p = whole;
        p.k = to - from;
        p.w = w, p.ldw = ldw;
        p.start = begin;
        p.a += from;
        p.c += column;
        p.mask += whole.mask ? column : 0;
        if (to < whole.k)
          p.finish = Finish::store;
        p.ahead_step = way == Ahead::share ? ceil_div(share, end_k - k) : 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t here = tile < taller ? height + 1 : height;
          const bool asks = ahead != nullptr && silent == 0 && asked < asking;
          silent = silent == 0 ? stride - 1 : silent - 1;
          p.ahead = asks ? ahead + asked++ * share : nullptr;
          multiply_with<T>(here, vectors, asks ? way : Ahead::nothing)(p);
          p.a += here * p.lda;
          p.c += here * p.ldc;
          p.mask += whole.mask ? here * p.ldmask : 0;
        }
      };
      if (k < direct)
        run(k, smaller(end_k, direct), whole.w + k * whole.ldw + column, whole.ldw, first);
      if (end_k > direct) {
        const int64_t from = larger(k, direct);
        for (int64_t i = from; i < end_k; ++i)
          for (int64_t j = 0; j < width; ++j)
            tail[(i - from) * width + j] = column + j < columns ? whole.w[i * whole.ldw + column + j] : T(0);
        run(from, end_k, tail, width, from == k ? first : nullptr);
      }
    }
  }
}

// dW[k, columns] of one panel from `rows` rows.
template <class T> void outer_product(const Outer<T> &whole, int64_t k, int64_t columns) {
  constexpr int n = lanes<T>;
  const int64_t row_block = 128; // A and dC of a pass stay in the second cache
  for (int64_t row = 0; row < whole.rows; row += row_block)
    for (int64_t column = 0; column < columns;) {
      const int64_t vectors = smaller(ceil_div(columns - column, n), max_columns);
      const int64_t tiles = ceil_div(k, max_rows(vectors));
      Outer<T> p = whole;
      p.rows = smaller(row_block, whole.rows - row);
      p.a += row * p.lda;
      p.d += row * p.ldd + column;
      p.w += column;
      p.columns = columns - column;
      p.add = whole.add || row > 0;
      for (int64_t tile = 0, at = 0; tile < tiles; ++tile) {
        const int64_t end = (tile + 1) * k / tiles;
        outer_with<T>(end - at, vectors)(p);
        p.a += end - at;
        p.w += (end - at) * p.ldw;
        at = end;
      }
      column += vectors * n;
    }
}

// to[column * to_stride + row] = from[row * from_stride + column]; rows of `to` may be written up to a whole vector.
template <class T>
void transpose_panel(const T *from, int64_t from_stride, int64_t rows, int64_t columns, T *to, int64_t to_stride) {
  constexpr int n = lanes<T>;
  for (int64_t row = 0; row < rows; row += n)
    for (int64_t column = 0; column < columns; column += n) {
      if (rows - row >= n && columns - column >= n) {
        transpose_square(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
        continue;
      }
      for (int64_t j = column; j < smaller(column + n, columns); ++j)
        for (int64_t i = row; i < row + n; ++i)
          to[j * to_stride + i] = i < rows ? from[i * from_stride + j] : T(0);
    }
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
