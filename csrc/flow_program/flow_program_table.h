// A flow program as the GPU walks it (flow_program_kernels.cuh): plain tables, which lie in global memory, and what
// must be done to the parameters before and to their gradients after a walk. Made of a plan by flow_program_table.cpp.
// Offsets of packed parameters and of gradients are in elements.
#pragma once

#include <cstdint>
#include <vector>

#include "flow_program/flow_program.h"

namespace iin_fast {

constexpr int program_threads = 256; // of a block

// A piece of the packed weights that goes to shared memory at once.
struct TablePanel {
  int at, size;
};

// A matrix as panels of `width` columns, [in, stride] each, and one row more for the bias; columns beyond `out` are 0.
// For tensor cores the width is of whole tiles of 16, and a stride of 4 more takes what a warp reads to different
// banks.
struct TableMatrix {
  int at;
  int in, out, width, stride, panels;
  int bias; // whether it has that row
};

// Values are rows of one array: the context first, then what the net makes. So are their gradients, in places of their
// own: a gradient's rows are free again once it has been passed on.
struct TableStep {
  int kind, activation;
  int fused;        // dense: the activation that follows in the same place; none: none
  int skip;         // act: the dense step before has done it
  int a, b, out;    // the first rows of the values it reads, and of that it makes
  int da, db, dout; // of their gradients
  int a_rows, rows;
  int add_a, add_b;    // backward: gradients of a and b are added to what is there
  int unread;          // nobody reads it: its gradient is 0
  int weight_gradient; // dense: in an accumulator; the bias's comes behind it
  double slope;
  TableMatrix forward, backward; // dense: the weight, and the same transposed
};

struct TableAffine {
  int squash, scale_at, scale_step, shift_at, shift_step;
  double clamp;
};

struct TableSpline {
  int bins, count, tails, form;
  SplineLimits<double> limits;
};

struct TableLayer {
  int kind, inverted, autoregressive, order, exact;
  int indices;            // where the layer's index lists begin, in bytes of its record
  int index, index_count; // conditioning features, or a permutation, among them; -1: it lies packed
  int transformed, transformed_count, passed, passed_count;
  int step_count;                   // steps stand behind the layer
  int input, output, raw, raw_rows; // rows of the net's input, outputs, and the transformer's raw values
  int input_gradient, output_gradient, raw_gradient; // of their gradients
  int input_has_gradient;
  int orders; // where those of an autoregressive layer begin
  int transformer, wrap;
  int packed, gradient;
  double slope, log_slope, gain;
  TableAffine affine;
  TableSpline spline;
};

// The bytes of a layer: itself, its steps, its index lists. The walk has those of two layers in shared memory.
struct TableRecord {
  int at, size;
};

// The panels of a walk, in its order.
enum : int { list_forward, list_inverse, list_backward, list_count = list_backward + 4 };
struct TableList {
  int first, count;
};

struct TableView {
  int dim, context, layer_count;
  int values, gradients; // rows, the most of any net
  int panel;             // elements of the largest panel
  int record, list;      // bytes of the largest record, panels of the longest list
  int orders;            // numbers of all orders
  int accumulator;       // elements
  int records, panels;   // where these begin in the table, in bytes
  TableList lists[list_count];
};

// How one parameter or layer is packed, and where its gradients go.
struct TablePart {
  enum Kind { dense, affine, linear, index } kind;
  bool panels = false;   // dense: the weight lies in panels
  bool inverted = false; // of its layer
  int storage = 0, form = 0;
  double eps = 0;
  // a row o of a dense weight counts `gain` times where o % gain_count < gain_rows: what a spline does to raw sizes
  double gain = 1;
  int gain_rows = 0, gain_count = 1;
  // dense: weight, mask, bias; affine: shift, scale; linear: lower, upper, diagonal, bias; index: itself
  ParameterRef a, b, c, d;
  int packed = 0, gradient = 0;
  int in = 0, out = 0; // dense; out: elements of the others
  TableMatrix forward{}, backward{};
};

struct Table {
  TableView view{};
  std::vector<unsigned char> bytes;
  std::vector<TablePart> parts;
  int64_t packed = 0;      // elements
  bool sequential[2] = {}; // whether a layer finds features one by one, forward and inverse
  bool fits = false;       // whether the walk on a GPU can run this program
};

// `item`: bytes of an element; `tape`: for the walk back, which needs all values of a net at once; `tensor`: whether
// tensor cores multiply.
Table table_of(const ProgramView &program, int item, bool tape, bool tensor);

// What a walk holds in shared memory, in bytes, for tiles of `rows`. TileWalk cuts it in this order.
inline int64_t shared_bytes(const TableView &v, int rows, int item, bool backward) {
  const int64_t ld = rows + 16 / item, dim = v.dim;
  int64_t elements = 2 * static_cast<int64_t>(v.panel) + (4 * dim + v.values + 2) * ld;
  if (backward)
    elements += (2 * dim + v.gradients + 1) * ld;
  const int64_t table = 8 * (static_cast<int64_t>(v.layer_count) + v.list);
  return 2 * static_cast<int64_t>(v.record) + (table + 15) / 16 * 16 + elements * item;
}

// log2 of the rows of a tile: the most that fit `room` bytes of shared memory and leave work for 128 blocks, but 8 at
// least. -1: not even those fit.
inline int choose_tile(const TableView &v, int64_t batch, int item, int64_t room, bool backward) {
  int chosen = -1;
  for (int log_rows = 3; log_rows <= 6; ++log_rows)
    if (shared_bytes(v, 1 << log_rows, item, backward) <= room &&
        (log_rows == 3 || (batch + (1 << log_rows) - 1) >> log_rows >= 128))
      chosen = log_rows;
  return chosen;
}

} // namespace iin_fast
