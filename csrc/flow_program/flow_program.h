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
  int64_t packed = -1;                            // dense with a mask: where the masked weight lies in Packed
  int64_t weight_gradient = 0, bias_gradient = 0; // in an accumulator, behind those of layers
};

// A value of a net: how many rows, and the first of them in the net's part of the tape. An activation that is computed
// in place shares the rows of its source.
struct ProgramValue {
  int64_t rows = 0, at = 0;
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
  int64_t raw_at = 0;   // what the transformer reads: a copy where it is scaled and still needed as it was
  int64_t net_rows = 0; // of the net's part of the tape
  bool reread = false;  // backward reads an output of the net as the net made it
  // A net that the wide walk can run: chains of dense layers in panels, LeakyReLU between them, each from the features
  // and perhaps a part of the context. Chain n, dense layer l is step chain + n * (2 * chain_layers - 1) + 2 * l.
  int64_t chain = 0, chains = 0, chain_layers = 0;
  int64_t context_first = 0, context_count = 0; // what of the context it reads
  double chain_slope = 0;
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
  int64_t packed_size = 0;                        // elements of Packed
  int64_t layer_gradients = 0, net_gradients = 0; // elements of an accumulator: of layers, then of dense steps
  int64_t net_rows = 0;                           // the largest net
  int64_t widest = 0;                             // rows of the widest value
  bool shared = false;                            // two layers read the same element of a parameter
  // All nets are chains. Of the largest: weights of a net, and of one layer of all its nets.
  bool chains = false;
  int64_t chain_weights = 0, chain_layer = 0;
  bool autoregressive = false; // has such a layer: its input cannot be had from its output in one pass
};

} // namespace iin_fast
