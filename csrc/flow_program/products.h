// The matrix products of a tile, whose rows of the batch lie in lanes: a value is [features, ld], ld a multiple of a
// cache line. Weights are read where torch keeps them, [out, in]:
//
//   multiply   C[rows, ld] = start + sum_k W[row, k] A[k, ld]: a dense layer, and with the strides of W exchanged its
//              transpose. An element of W is broadcast, a vector of A serves all rows of a register tile.
//   outer      dW[out, in] (+)= sum_r D[out, r] A^T[r, in] from A turned by `transpose`: the same product.
//
// The products of csrc/flow/gemm.h have outputs in lanes and weights in panels that stream from memory: other tiles.
// Register tiles are R rows x C vectors, for 16 or 32 vector registers.
#pragma once

#include "common/simd.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

template <class T> struct Multiply {
  const T *w; // element (row, k) at w[row * row_stride + k * k_stride]
  int64_t row_stride, k_stride, k;
  const T *a; // [k, ld]
  T *c;       // [rows, ld]
  int64_t ld;
  const T *start; // [rows], or null for 0
  bool add;       // to what c holds, instead of start
};

constexpr int most_vectors = 4;
constexpr int most_rows(int vectors) {
  return vector_registers == 32 ? (vectors == 4   ? 6
                                   : vectors == 3 ? 8
                                                  : 12)
                                : (vectors == 4   ? 3
                                   : vectors == 3 ? 4
                                   : vectors == 2 ? 6
                                                  : 9);
}

template <class T, int R, int C> void multiply_tile(const Multiply<T> &p) {
  constexpr int n = lanes<T>;
  vec<T> sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      sum[r][c] = p.add ? load(p.c + r * p.ld + c * n) : broadcast(p.start ? p.start[r] : T(0));
  // three rows to a pointer: few enough for the address registers
  constexpr int groups = (R + 2) / 3;
  const T *w[groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g)
    w[g] = p.w + 3 * g * p.row_stride;
  const T *a = p.a;
  const int64_t ld = p.ld, row_stride = p.row_stride, k_stride = p.k_stride;
  for (int64_t k = p.k; k > 0; --k) {
    vec<T> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      b[c] = load(a + c * n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec<T> value = broadcast(w[r / 3][(r % 3) * row_stride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] += value * b[c];
    }
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g)
      w[g] += k_stride;
    a += ld;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      store(p.c + r * p.ld + c * n, sum[r][c]);
}

// Tiles::tile<R, C> of at most Tiles::most(C) rows, for sizes that are known at run time.
template <class Tiles, int C, int... R> auto tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr typename Tiles::Type tiles[] = {Tiles::template tile<R + 1, C>...};
  return tiles[rows - 1];
}

template <class Tiles, int C = most_vectors> typename Tiles::Type tile_with(int64_t rows, int64_t vectors) {
  if constexpr (C > 1)
    if (vectors < C)
      return tile_with<Tiles, C - 1>(rows, vectors);
  return tile_of<Tiles, C>(rows, std::make_integer_sequence<int, Tiles::most(C)>());
}

template <class T> struct MultiplyTiles {
  using Type = void (*)(const Multiply<T> &);
  template <int R, int C> static constexpr Type tile = multiply_tile<T, R, C>;
  static constexpr int most(int vectors) { return most_rows(vectors); }
};

// `vectors` of each row of C.
template <class T> void multiply(const Multiply<T> &whole, int64_t rows, int64_t vectors) {
  const int64_t parts = ceil_div(vectors, most_vectors);
  for (int64_t part = 0, vector = 0; part < parts; ++part) {
    const int64_t next = (part + 1) * vectors / parts, width = next - vector;
    const int64_t tiles = ceil_div(rows, most_rows(width));
    Multiply<T> p = whole;
    p.a += vector * lanes<T>;
    p.c += vector * lanes<T>;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
      const int64_t end = (tile + 1) * rows / tiles; // tiles of nearly equal height
      tile_with<MultiplyTiles<T>>(end - row, width)(p);
      p.w += (end - row) * p.row_stride;
      p.c += (end - row) * p.ld;
      if (p.start != nullptr)
        p.start += end - row;
      row = end;
    }
    vector = next;
  }
}

template <class T> void multiply(const Multiply<T> &whole, int64_t rows) { multiply(whole, rows, whole.ld / lanes<T>); }

// Some rows of a dense layer, from some rows of its input: the others have weights of 0 there.
template <class T> struct MultiplyRows {
  const T *w; // [out, k]
  const T *bias;
  int64_t k;
  const T *a; // [k, ld]
  T *c;       // [out, ld]
  int64_t ld;
  const int32_t *inputs; // rows of a
  int64_t input_count;
};

template <class T, int R, int C> void multiply_rows_tile(const MultiplyRows<T> &p, const int32_t *rows) {
  constexpr int n = lanes<T>;
  constexpr int held = R * C + C < vector_registers ? C : C - 1; // in registers, beside the sums and a weight
  vec<T> sum[R][C];
  const T *w[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    w[r] = p.w + rows[r] * p.k;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      sum[r][c] = broadcast(p.bias ? p.bias[rows[r]] : T(0));
  }
  const int32_t *const end = p.inputs + p.input_count;
  for (const int32_t *input = p.inputs; input != end; ++input) {
    const int64_t k = *input;
    const T *const a = p.a + k * p.ld;
    vec<T> b[C];
#pragma GCC unroll 4
    for (int c = 0; c < held; ++c)
      b[c] = load(a + c * n);
    const T *last = a + held * n;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec<T> value = broadcast(w[r][k]);
#pragma GCC unroll 4
      for (int c = 0; c < held; ++c)
        sum[r][c] += value * b[c];
      if constexpr (held < C) {
        __asm__("" : "+r"(last)); // to be read again
        sum[r][held] += value * load(last);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      store(p.c + rows[r] * p.ld + c * n, sum[r][c]);
}

template <class T> struct MultiplyRowsTiles {
  using Type = void (*)(const MultiplyRows<T> &, const int32_t *);
  template <int R, int C> static constexpr Type tile = multiply_rows_tile<T, R, C>;
  static constexpr int most(int) { return most_rows(most_vectors); }
};

template <class T> void multiply_rows(MultiplyRows<T> p, const int32_t *rows, int64_t count) {
  const int64_t tiles = ceil_div(count, most_rows(most_vectors));
  for (int64_t vector = 0, vectors = p.ld / lanes<T>; vector < vectors; vector += most_vectors) {
    const int64_t width = smaller(vectors - vector, most_vectors);
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
      const int64_t end = (tile + 1) * count / tiles;
      tile_with<MultiplyRowsTiles<T>>(end - row, width)(p, rows + row);
      row = end;
    }
    p.a += width * lanes<T>, p.c += width * lanes<T>;
  }
}

template <class T> struct Outer {
  const T *d; // [out, ld]
  int64_t ld;
  const T *a; // [rows, lda]: the activations, turned
  int64_t lda, rows;
  T *w; // [out, lda]
  bool add;
};

// lda is padded to whole vectors; of the padding, what lies in the last vector of `in` is written.
template <class T> void outer(const Outer<T> &p, int64_t out, int64_t in) {
  multiply<T>({p.d, p.ld, 1, p.rows, p.a, p.w, p.lda, nullptr, p.add}, out, ceil_div(in, lanes<T>));
}

// to[r, i] = from[i, r] for i < count, r < ld; `to` has rows of `stride`, whose padding up to a whole vector becomes 0.
template <class T> void transpose(const T *from, int64_t count, int64_t ld, T *to, int64_t stride) {
  constexpr int n = lanes<T>;
  int64_t i = 0;
  for (; i + n <= count; i += n)
    for (int64_t r = 0; r < ld; r += n)
      transpose_square(from + i * ld + r, ld, to + r * stride + i, stride);
  if (i < count)
    for (int64_t r = 0; r < ld; ++r)
      for (int64_t j = i; j < i + n; ++j)
        to[r * stride + j] = j < count ? from[j * ld + r] : T(0);
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
