// A flow program as the CPU engine reads it: the layers, the steps of their nets, and where each lies in memory.
//
// The text of a program (iin_fast/flow/program.py) is parsed once and kept (flow_program_plan.cpp). The loops see plain
// arrays: code that allocates would have one copy for all instruction sets.
#pragma once

#include <cstdint>

#include "spline_coupling/spline_coupling.h"

namespace iin_fast {

// A parameter: an offset into one of the tensors, in elements; tensor < 0: absent.
struct ParameterRef {
  int64_t tensor = -1, offset = 0;
  bool present() const { return tensor >= 0; }
};

// Values are part of the text of a program.
enum class Activation : int64_t { none, relu, leaky_relu, elu, silu, gelu, tanh, sigmoid, atan };
enum class ScaleForm : int64_t { plain, exp, softplus };

enum class StepKind { dense, act, add, glu, concat, context };

// One step of a net. Value 0 is what conditions, value 1 the context, step k makes value 2 + k.
struct ProgramStep {
  StepKind kind = StepKind::act;
  int64_t a = 0, b = 0; // the values it reads
  Activation activation = Activation::none;
  double slope = 0;
  int64_t in = 0, out = 0; // dense
  bool panels = false;     // dense: the weight lies in panels, see iin_fast/ops/flow/layout.py
  int64_t first = 0;       // context: the first of its features
  ParameterRef weight, bias, mask;
  int64_t packed = -1;                            // dense with a mask: where the masked weight lies, in the tile walk
  int64_t weight_gradient = 0, bias_gradient = 0; // in an accumulator, behind those of layers
  bool in_place = false;                          // act: its value has the place of what it reads

  // The wide walk. Steps of a wave need nothing of each other.
  int64_t wave = 0;
  bool joined = false;    // act: the dense step that it reads applies it
  int64_t act = -1;       // dense: the step whose ReLU or LeakyReLU it applies by itself
  int64_t undo = -1;      // dense: the same step of what it reads, whose derivative it applies to the gradient of that
  bool act_first = false; // dense: backward begins with the derivative of `act`, which no reader has applied
  bool unread = false;    // no step reads its value, and it is no output
  bool add_a = false, add_b = false; // backward adds to the gradients of a and b, since another step came before
};

// Where a value lies in the wide walk, in which it is [rows of the batch, stride]: how many elements of a row come
// before it where all values are kept, where those that nobody needs any more give their place away, and of its
// gradient.
struct RowPlace {
  int64_t stride = 0, kept = 0, work = 0, gradient = 0;
};

// A value of a net: how many features, and the first of them in the net's part of the tape. An activation that is
// computed in place shares the rows of its source.
struct ProgramValue {
  int64_t rows = 0, at = 0;
  RowPlace row[2]; // of float, of double
};

// Steps of one wave in ProgramLayer::by_wave: first those that work element by element, then dense ones.
struct ProgramWave {
  int64_t first, dense, end;
};

enum class LayerKind { affine, permute, linear, coupling, activation };
enum class TransformerKind { affine, spline };

struct AffineTransformer {
  int64_t squash = 0; // SQUASHES of iin_fast/ops/affine_coupling
  double clamp = 1, gain = 1;
  int64_t scale_at = -1, scale_step = 0, shift_at = 0, shift_step = 0;
};

struct SplineTransformer {
  int64_t bins = 0, tails = 0, form = 0, count = 0;
  SplineLimits<double> limits{};
  double gain = 1;
  bool wrap = false;
};

struct ProgramLayer {
  LayerKind kind = LayerKind::permute;
  bool inverted = false; // the inverse map stands in the forward direction

  // affine, linear
  int64_t order = 0, storage = 0;
  ScaleForm form = ScaleForm::plain;
  double eps = 0;
  ParameterRef shift, scale; // affine; linear: shift is the bias, scale the diagonal
  ParameterRef lower, upper; // linear
  int64_t packed = 0;        // affine: scale, log|det|; linear: L, U, diagonal, log|det|
  int64_t gradient = 0;      // in an accumulator
  // permute: index; coupling: what conditions, what is transformed, what passes
  const int64_t *index = nullptr, *transformed = nullptr, *passed = nullptr;
  int64_t index_count = 0, transformed_count = 0, passed_count = 0;
  ParameterRef index_at; // permute: where the index is no part of the text
  // coupling
  bool autoregressive = false;
  const ProgramStep *steps = nullptr;
  const ProgramValue *values = nullptr;
  int64_t step_count = 0;
  int64_t output_at = 0, raw_rows = 0; // what the net makes, in its part of the tape
  int64_t raw_at = 0;               // what the transformer reads: a copy where it is scaled and still needed as it was
  int64_t net_rows = 0;             // of the net's part of the tape
  bool reread = false;              // backward reads an output of the net as the net made it
  const int64_t *outputs = nullptr; // values, in the order of the raw rows
  int64_t output_count = 0;
  // The wide walk.
  const int64_t *by_wave = nullptr; // steps by wave, without those that a dense step applies by itself
  const ProgramWave *waves = nullptr;
  int64_t wave_count = 0;
  bool reads_features = false, reads_context = false;
  int64_t chain = 0,
          chains = 0; // from step `chain` on: so many nets of as many steps, each a chain with its own output
  int64_t kept_stride[2] = {}, work_stride[2] = {}, gradient_stride[2] = {}; // elements of a row, of float and double
  TransformerKind transformer = TransformerKind::affine;
  AffineTransformer affine;
  SplineTransformer spline;
  // activation
  double slope = 1;
  bool exact = false;
};

// What the loops need of a plan.
struct ProgramView {
  int64_t dim = 0, context = 0, tensors = 0;
  const ProgramLayer *layers = nullptr;
  int64_t layer_count = 0;
  int64_t packed_size = 0;                        // elements of what layers are packed into
  int64_t masked_size = 0;                        // of masked weights
  int64_t layer_gradients = 0, net_gradients = 0; // elements of an accumulator: of layers, then of dense steps
  int64_t net_rows = 0;                           // the largest net
  int64_t widest = 0;                             // rows of the widest value
  bool shared = false;                            // two layers read the same element of a parameter
  int64_t net_weights = 0, wave_weights = 0;      // of the largest net, and of the largest wave of all nets
  bool panels = false;                            // some of their weights lie in panels
  bool reads_context = false;
  bool autoregressive = false; // has such a layer: its input cannot be had from its output in one pass
  bool sequential[2] = {};     // has one that runs feature by feature, in the forward and in the inverse direction
};

} // namespace iin_fast
