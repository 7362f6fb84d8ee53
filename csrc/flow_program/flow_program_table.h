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
  int64_t at;
  int64_t size;
};

// A matrix as panels of `width` columns, [in, width] each; columns beyond `out` are 0.
struct TableMatrix {
  int64_t at;
  int in, out, width, panels;
};

// Values are rows of one array: the context first, then what the net makes.
struct TableStep {
  int kind, activation;
  int fused; // dense: the activation that follows in the same place; none: none
  int skip;  // act: the dense step before has done it
  int a, b;  // the first rows of the values it reads
  int out;   // and of that it makes
  int a_rows, rows;
  int add_a, add_b; // backward: gradients of a and b are added to what is there
  int unread;       // nobody reads it: its gradient is 0
  double slope;
  TableMatrix forward, backward; // dense: the weight, and the same transposed
  int64_t bias;                  // -1: none
  int64_t weight_gradient, bias_gradient;
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
  int index, index_count; // conditioning features, or a permutation; -1: it lies packed
  int transformed, transformed_count, passed, passed_count;
  int first_step, step_count;
  int input, output, raw, raw_rows; // rows of the net's input, its outputs, and the raw values of the transformer
  int input_has_gradient;
  int orders; // where those of an autoregressive layer begin
  int transformer, wrap;
  double slope, log_slope, gain;
  int64_t packed, gradient;
  TableAffine affine;
  TableSpline spline;
};

// The panels of a walk, in its order.
enum : int { list_forward, list_inverse, list_backward, list_count = list_backward + 4 };
struct TableList {
  int first, count;
};

struct TableView {
  int dim, context, layer_count;
  int values;                             // rows of values, the most of any net
  int panel;                              // elements of the largest panel
  int orders;                             // numbers of all orders
  int64_t accumulator;                    // elements
  int64_t layers, steps, panels, indices; // where these begin in the table, in bytes
  TableList lists[list_count];
};

// How one parameter or layer is packed, and where its gradients go.
struct TablePart {
  enum Kind { dense, affine, linear, index } kind;
  bool panels = false;   // dense: the weight lies in panels
  bool inverted = false; // of its layer
  int storage = 0, form = 0;
  double eps = 0;
  // dense: weight, mask, bias; affine: shift, scale; linear: lower, upper, diagonal, bias; index: itself
  ParameterRef a, b, c, d;
  int64_t packed = 0, gradient = 0;
  int in = 0, out = 0; // dense; out: elements of the others
  TableMatrix forward{}, backward{};
};

struct Table {
  TableView view{};
  std::vector<unsigned char> bytes;
  std::vector<TablePart> parts;
  int64_t packed = 0; // elements
  bool fits = false;  // whether the walk on a GPU can run this program
};

// `item`: bytes of an element.
Table table_of(const ProgramView &program, int item);

// Elements of shared memory for tiles of `rows`.
inline int64_t shared_elements(const TableView &v, int rows, int item, bool backward) {
  const int64_t ld = rows + 16 / item;
  const int64_t both = 2 * static_cast<int64_t>(v.panel) + (4 * static_cast<int64_t>(v.dim) + v.values + 2) * ld;
  return backward ? both + (2 * static_cast<int64_t>(v.dim) + v.values + 1) * ld : both;
}

// log2 of the rows of a tile: the most that fit `room` bytes of shared memory and leave work for 128 blocks, but 8 at
// least. -1: not even those fit.
inline int choose_tile(const TableView &v, int64_t batch, int item, int64_t room, bool backward) {
  int chosen = -1;
  for (int log_rows = 3; log_rows <= 6; ++log_rows)
    if (shared_elements(v, 1 << log_rows, item, backward) * item <= room &&
        (log_rows == 3 || (batch + (1 << log_rows) - 1) >> log_rows >= 128))
      chosen = log_rows;
  return chosen;
}

} // namespace iin_fast
