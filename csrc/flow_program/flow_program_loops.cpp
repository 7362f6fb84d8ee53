// Any flow on the CPU, in one of two walks over its layers:
//
//   tile   a thread takes a tile of rows and walks it through all layers.
//   wide   where nets are large or rows few: threads share each net, for all rows at once (wide_net.h), so that weights
//          stream from memory once a call. Between two nets each tile takes the same steps as in the tile walk.
//
// A tile is 16 to 64 rows. Its rows lie in lanes: every value is [features, ld], ld the rows of the tile up to a whole
// cache line, so that features need no padding, weights are read as torch keeps them, and the raw values of a spline
// are where its loops want them. Rows beyond the batch repeat its last one; their gradients are 0. Tiles are cut by the
// size of the batch alone, and so are the accumulators of weight gradients: results don't depend on the number of
// threads.
//
// Bytes: x, y and log-det once; weights once a tile, from the second cache. Backward walks a tile forward again, with
// all its values on a tape in the thread's workspace (or reads what forward kept, see Keep), then back, at 4/3 of the
// arithmetic; weight gradients are read and written once a tile in the accumulator, and added up at the end.
#include "flow_program/flow_program_loops.h"

#include <cmath>

#include "affine_coupling/affine_coupling.h"
#include "common/affine.h"
#include "flow/flow.h"
#include "flow_program/products.h"
#include "flow_program/steps.h"
#include "flow_program/transformers.h"
#include "flow_program/wide_net.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// Rows of a tile: few for small batches, so that threads share them; more for large ones, which read weights less
// often.
int64_t tile_rows(int64_t batch) { return batch <= 32 ? 16 : batch <= 1024 ? 32 : 64; }
int64_t tile_count(int64_t batch) { return ceil_div(batch, tile_rows(batch)); }

// Accumulators of weight gradients, each of some tiles in order; few where they are large.
int64_t accumulator_count(const ProgramView &program, int64_t batch) {
  constexpr int64_t elements = 16 << 20; // of all of them
  const int64_t tiles = tile_count(batch), wanted = smaller(larger(tiles / 8, 4), 32);
  return smaller(tiles,
                 larger(smaller(wanted, elements / larger(program.layer_gradients + program.net_gradients, 1)), 2));
}

template <class T> int64_t leading(int64_t batch) { // ld of all tiles
  const int64_t rows = ceil_div(batch, larger(tile_count(batch), 1));
  return ceil_div(larger(rows, 1), block_size<T>) * block_size<T>;
}

int64_t padded(int64_t count) { return ceil_div(count, 16) * 16; }

// Which walk (docs/performance.md has what was tried). Batches of fewer rows would leave lanes of a tile empty. Nets of
// more bytes take the wide walk, those in panels at once; others, which it has to turn, where its steps are long enough
// to be shared.
constexpr int64_t wide_rows = 16, panel_bytes = 48 * 1024, wide_bytes = 128 * 1024;

// A step costs a few microseconds to start (and far more on a machine that is busy with something else), so a step
// that is worth less than this on one core is not shared. In nanoseconds.
constexpr double shared_step = 10e3;

// What one AVX-512 core takes for the widest step of all nets, bound by arithmetic or by reading the weights.
template <class T> double widest_step(const ProgramView &program, int64_t batch) {
  constexpr double flops = 200, bytes = 30; // per nanosecond
  const double arithmetic = 2.0 * batch / flops, reading = sizeof(T) / bytes;
  return program.wave_weights * (arithmetic > reading ? arithmetic : reading);
}

// Masked weights of fewer elements are packed by one thread.
constexpr int64_t shared_masked = 8192;

// Whether `saved` is the tape of every tile.
bool keeps_tape(Keep keep) { return keep == Keep::inputs || keep == Keep::all; }

// Hands out pieces of the workspace, each on a cache line. With base null it only counts.
template <class T> struct Pieces {
  T *base;
  int64_t used = 0;
  T *take(int64_t count) {
    T *piece = base == nullptr ? nullptr : base + used;
    used += padded(count);
    return piece;
  }
};

// Where the parts of a tape begin, in rows of ld.
struct TapeLayout {
  const ProgramView &program;
  Keep keep;
  int64_t input(int64_t position) const { // of the layer that runs at `position`; that behind the last is the output
    return position * program.dim;
  }
  int64_t inputs() const { return (program.layer_count + 1) * program.dim; }
  int64_t rows() const {
    int64_t rows = inputs();
    if (keep == Keep::all)
      for (int64_t l = 0; l < program.layer_count; ++l)
        rows += program.layers[l].net_rows;
    return rows;
  }
};

// The memory of one thread.
template <class T> struct Workspace {
  T *tape, *net, *context, *logdet, *lost, *temporary, *spline;               // both passes
  T *gradients[2], *net_gradients, *context_gradients, *grad_logdet, *turned; // backward
};

template <class T>
Workspace<T> workspace_of(Pieces<T> &pieces, const ProgramView &p, int64_t ld, int64_t tape_rows, int64_t net_rows,
                          bool backward) {
  int64_t splines = 0;
  for (int64_t l = 0; l < p.layer_count; ++l)
    if (p.layers[l].transformer == TransformerKind::spline)
      splines = larger(splines, spline_work<T>(p.layers[l].spline.bins));
  Workspace<T> w{};
  w.tape = pieces.take(tape_rows * ld);
  w.net = pieces.take(net_rows * ld);
  w.context = pieces.take(p.context * ld);
  w.logdet = pieces.take(ld), w.lost = pieces.take(ld);
  w.temporary = pieces.take(2 * p.dim * ld);
  w.spline = pieces.take(splines);
  if (backward) {
    for (T *&g : w.gradients)
      g = pieces.take(p.dim * ld);
    w.net_gradients = pieces.take(net_rows * ld);
    w.context_gradients = pieces.take(p.context * ld);
    w.grad_logdet = pieces.take(ld);
    w.turned = pieces.take(ld * padded(p.widest));
  }
  return w;
}

template <class T> class WideWalk;

// The layers of a program on a tile.
template <class T> class Program {
public:
  explicit Program(const ProgramJob<T> &job) : job_(job), p_(job.program), ld_(leading<T>(job.batch)) {}

  // Where gradients of parameters are wanted: null elsewhere. To be told before backward.
  void wants(T *const *grads) { grads_ = grads; }

  // Triangular matrices and scales: once a call.
  void pack(T *packed) {
    packed_ = packed;
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const ProgramLayer &layer = p_.layers[l];
      if (layer.kind == LayerKind::affine)
        pack_affine(layer);
      else if (layer.kind == LayerKind::linear)
        pack_linear(layer);
    }
  }

  // Weights times their masks, for the tile walk: once a call, by all threads where there are many.
  void pack_masked(T *masked) {
    masked_ = masked;
    run(Team{p_.masked_size < shared_masked ? 1 : job_.threads, job_.parallel}, p_.masked_size,
        [this](int64_t begin, int64_t end) {
          for (int64_t l = 0; l < p_.layer_count; ++l)
            for (int64_t k = 0; k < p_.layers[l].step_count; ++k)
              pack_mask(p_.layers[l].steps[k], begin, end);
        });
  }

  // Of autoregressive layers that run by their inverse: which rows of each value are known after which step. Behind the
  // packed weights, see order_size of a layer.
  int64_t order_size() const {
    int64_t size = 0;
    for (int64_t l = 0; l < p_.layer_count; ++l)
      if (sequential(p_.layers[l]))
        size += order_size(p_.layers[l]);
    return size;
  }

  // Gives the first layer that has no order, or -1. To be asked once weights are multiplied with their masks.
  int64_t order(int32_t *orders) {
    orders_ = orders;
    for (int64_t l = 0; l < p_.layer_count; ++l)
      if (sequential(p_.layers[l])) {
        hidden_nan_ = hidden_nan_ || masked_nan(p_.layers[l]);
        order_layer(p_.layers[l], orders);
        for (int64_t j = 0; j < p_.dim; ++j)
          if (orders[j] == unknown)
            return l;
        sort_layer(p_.layers[l], orders);
        orders += order_size(p_.layers[l]);
      }
    return -1;
  }

  // Rows [first, first + rows) of the batch.
  void forward(int64_t tile, const Workspace<T> &w, Keep keep) const {
    const int64_t first = first_row(tile), rows = first_row(tile + 1) - first;
    T *const tape = keeps_tape(job_.keep) ? job_.saved + tile * TapeLayout{p_, keep}.rows() * ld_ : w.tape;
    read(job_.x, p_.dim, first, rows, tape);
    if (p_.context)
      read(job_.context, p_.context, first, rows, w.context);
    walk(w, tape, keep);
    finish(tape + TapeLayout{p_, keep}.input(p_.layer_count) * ld_, tile, w);
  }

  void backward(const ProgramBackwardJob<T> &job, int64_t tile, const Workspace<T> &w, T *accumulator, bool add) const {
    const int64_t first = first_row(tile), rows = first_row(tile + 1) - first;
    const Keep kept = job_.keep, keep = keeps_tape(kept) ? kept : Keep::all;
    const TapeLayout layout{p_, keep};
    T *const tape = keeps_tape(kept) ? job_.saved + tile * layout.rows() * ld_ : w.tape;
    if (p_.context)
      read(job_.context, p_.context, first, rows, w.context);
    if (kept == Keep::nothing) {
      read(job_.x, p_.dim, first, rows, tape);
      walk(w, tape, keep);
      if (job_.y != nullptr)
        finish(tape + layout.input(p_.layer_count) * ld_, tile, w);
    } else if (kept == Keep::output) {
      read(job_.saved, p_.dim, first, rows, tape + layout.input(p_.layer_count) * ld_);
      walk_back(w, tape);
    }
    T *g = w.gradients[0], *next = w.gradients[1];
    begin_gradient(job, tile, tape + layout.input(p_.layer_count) * ld_, w, g);
    if (job.grad_context != nullptr)
      for (int64_t i = 0; i < p_.context * ld_; ++i)
        w.context_gradients[i] = T(0);
    const T *net = tape + layout.rows() * ld_; // behind the last
    for (int64_t position = p_.layer_count - 1; position >= 0; --position) {
      const ProgramLayer &layer = layer_at(position);
      const T *const x = tape + layout.input(position) * ld_, *const y = tape + layout.input(position + 1) * ld_;
      const T *values = w.net;
      if (keep == Keep::all)
        values = net -= layer.net_rows * ld_;
      else if (layer.kind == LayerKind::coupling) // its net reads the coordinates that pass unchanged, or all of x
        evaluate(layer, inverse_of(layer) && layer.autoregressive ? y : x, w, w.net);
      layer_backward(layer, x, y, values, g, next, w, accumulator, add, rows, job.grad_context != nullptr);
      T *const other = g;
      g = next, next = other;
    }
    write(g, p_.dim, first, rows, job.grad_x);
    if (job.grad_context != nullptr)
      write(w.context_gradients, p_.context, first, rows, job.grad_context);
  }

  // The gradients of a layer's parameters from all accumulators.
  void reduce(const ProgramBackwardJob<T> &job, int64_t index, const T *accumulators, int64_t stride, int64_t count,
              bool add) const;

  int64_t ld() const { return ld_; }

private:
  template <class> friend class WideWalk;
  int64_t first_row(int64_t tile) const { return tile * job_.batch / tile_count(job_.batch); }
  const ProgramLayer &layer_at(int64_t position) const {
    return p_.layers[job_.inverse ? p_.layer_count - 1 - position : position];
  }
  bool sequential(const ProgramLayer &l) const {
    return l.kind == LayerKind::coupling && l.autoregressive && inverse_of(l);
  }
  const T *parameter(const ParameterRef &r) const {
    return r.present() ? static_cast<const T *>(job_.parameters[r.tensor]) + r.offset : nullptr;
  }
  const T *weight(const ProgramStep &s) const { return s.packed >= 0 ? masked_ + s.packed : parameter(s.weight); }
  bool mask_at(const ParameterRef &r, int64_t i) const {
    const void *data = job_.parameters[r.tensor];
    return job_.bool_mask[r.tensor] ? static_cast<const uint8_t *>(data)[r.offset + i] != 0
                                    : static_cast<const T *>(data)[r.offset + i] != T(0);
  }

  void read(const T *from, int64_t count, int64_t first, int64_t rows, T *to, bool zero = false) const {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t l = 0; l < ld_; ++l)
        to[j * ld_ + l] = l < rows ? from[(first + l) * count + j] : zero ? T(0) : from[(first + rows - 1) * count + j];
  }
  void write(const T *from, int64_t count, int64_t first, int64_t rows, T *to) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; ++j)
        to[(first + r) * count + j] = from[j * ld_ + r];
  }

  // What of a masked weight lies in [begin, end) of all of them.
  void pack_mask(const ProgramStep &s, int64_t begin, int64_t end) const {
    if (s.packed < 0)
      return;
    const int64_t first = larger(begin - s.packed, 0), last = smaller(end - s.packed, s.in * s.out);
    const T *const w = parameter(s.weight);
    T *const to = masked_ + s.packed;
    const void *const data = job_.parameters[s.mask.tensor];
    if (job_.bool_mask[s.mask.tensor]) {
      const uint8_t *const mask = static_cast<const uint8_t *>(data) + s.mask.offset;
#pragma omp simd
      for (int64_t i = first; i < last; ++i)
        to[i] = w[i] * T(mask[i] != 0);
    } else {
      const T *const mask = static_cast<const T *>(data) + s.mask.offset;
#pragma omp simd
      for (int64_t i = first; i < last; ++i)
        to[i] = w[i] * mask[i];
    }
  }

  // [dim] scales, and behind them the log-det.
  void pack_affine(const ProgramLayer &l) {
    const T *const raw = parameter(l.scale);
    T *const scale = packed_ + l.packed, *const logdet = scale + padded(p_.dim);
    *logdet = T(0);
    if (raw == nullptr) {
      for (int64_t j = 0; j < p_.dim; ++j)
        scale[j] = T(1);
      return;
    }
    const T eps = T(l.eps);
    CompensatedSum<double> total;
    const auto pack = [&](auto form) {
      constexpr int64_t piece = 64;
      alignas(64) T terms[piece];
      for (int64_t first = 0; first < p_.dim; first += piece) {
        const int64_t count = smaller(piece, p_.dim - first);
        const T *const from = raw + first;
        T *const to = scale + first;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          to[j] = scale_of(decltype(form)::value, from[j], eps);
          terms[j] = log_scale(decltype(form)::value, from[j], to[j]);
        }
        add_terms<T>(total, count, [&](int64_t j) __attribute__((always_inline)) { return terms[j]; });
      }
    };
    switch (l.form) {
    case ScaleForm::plain:
      pack(std::integral_constant<ScaleForm, ScaleForm::plain>());
      break;
    case ScaleForm::exp:
      pack(std::integral_constant<ScaleForm, ScaleForm::exp>());
      break;
    case ScaleForm::softplus:
      pack(std::integral_constant<ScaleForm, ScaleForm::softplus>());
      break;
    }
    *logdet = static_cast<T>(total.total());
  }

  // L with its unit diagonal, U with its diagonal, [dim, dim] each, and the log-det.
  void pack_linear(const ProgramLayer &l) {
    const int64_t dim = p_.dim;
    T *const lower = packed_ + l.packed, *const upper = lower + padded(dim * dim);
    T total = T(0), lost = T(0);
    const T *const a = parameter(l.lower), *const b = parameter(l.upper), *const d = parameter(l.scale);
    int64_t below = 0, above = 0;
    for (int64_t i = 0; i < dim; ++i)
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t at = i * dim + j;
        lower[at] = i == j ? T(1) : j > i ? T(0) : l.storage == 0 ? a[below++] : a[at];
        upper[at] = j < i   ? T(0)
                    : j > i ? (l.storage == 0 ? b[above++] : a[at])
                            : scale_of(l.form, l.storage == 0 ? d[i] : a[at], T(l.eps));
        if (i == j)
          add_term(total, lost, log_scale(l.form, l.storage == 0 ? d[i] : a[at], upper[at]));
      }
    upper[padded(dim * dim)] = CompensatedSum<T>{total, lost}.total();
  }

  void add_logdet(const Workspace<T> &w, T value) const {
    for (int64_t l = 0; l < ld_; ++l)
      add_term(w.logdet[l], w.lost[l], value);
  }

  // All layers of a tile, from tape's first input on. `keep`: what the tape has room for.
  void walk(const Workspace<T> &w, T *tape, Keep keep) const {
    const TapeLayout layout{p_, keep};
    for (int64_t l = 0; l < ld_; ++l)
      w.logdet[l] = w.lost[l] = T(0);
    T *net = tape + layout.inputs() * ld_;
    for (int64_t position = 0; position < p_.layer_count; ++position) {
      const ProgramLayer &layer = layer_at(position);
      T *const x = tape + layout.input(position) * ld_, *const y = tape + layout.input(position + 1) * ld_;
      layer_forward(layer, inverse_of(layer), x, y, keep == Keep::all ? net : w.net, w);
      if (keep == Keep::all)
        net += layer.net_rows * ld_;
    }
  }

  // The results of a tile, from its output.
  void finish(const T *y, int64_t tile, const Workspace<T> &w) const {
    const int64_t first = first_row(tile), rows = first_row(tile + 1) - first;
    if (job_.base)
      base_forward(y, w);
    write(y, p_.dim, first, rows, job_.y);
    if (job_.keep == Keep::output)
      write(y, p_.dim, first, rows, job_.saved);
    for (int64_t r = 0; r < rows; ++r)
      job_.logdet[first + r] = CompensatedSum<T>{w.logdet[r], w.lost[r]}.total();
  }

  // The gradient of a tile's output y.
  void begin_gradient(const ProgramBackwardJob<T> &job, int64_t tile, const T *y, const Workspace<T> &w, T *g) const {
    const int64_t first = first_row(tile), rows = first_row(tile + 1) - first;
    if (job.grad_y != nullptr)
      read(job.grad_y, p_.dim, first, rows, g, true);
    else
      begin(g, p_.dim * ld_, false);
    for (int64_t l = 0; l < ld_; ++l)
      w.grad_logdet[l] = l < rows ? job.grad_logdet[first + l] : T(0);
    if (job_.base)
      base_backward(y, w.grad_logdet, g);
  }

  // From the output to all inputs, with the values of all nets: a tape of Keep::all.
  void walk_back(const Workspace<T> &w, T *tape) const {
    const TapeLayout layout{p_, Keep::all};
    begin(w.logdet, ld_, false), begin(w.lost, ld_, false);
    T *net = tape + layout.rows() * ld_;
    for (int64_t position = p_.layer_count - 1; position >= 0; --position) {
      const ProgramLayer &layer = layer_at(position);
      net -= layer.net_rows * ld_;
      layer_forward(layer, !inverse_of(layer), tape + layout.input(position + 1) * ld_,
                    tape + layout.input(position) * ld_, net, w);
    }
  }

  // The log-density of a standard normal.
  void base_forward(const T *y, const Workspace<T> &w) const {
    for (int64_t j = 0; j < p_.dim; ++j)
      for (int64_t l = 0; l < ld_; ++l) {
        const T value = y[j * ld_ + l];
        add_term(w.logdet[l], w.lost[l], normal_term(value));
      }
  }
  void base_backward(const T *y, const T *grad_logdet, T *g) const {
    for (int64_t j = 0; j < p_.dim; ++j)
      for (int64_t l = 0; l < ld_; ++l)
        g[j * ld_ + l] -= grad_logdet[l] * y[j * ld_ + l];
  }

  bool inverse_of(const ProgramLayer &layer) const { return layer.inverted != job_.inverse; }

  void layer_forward(const ProgramLayer &layer, bool inverse, const T *x, T *y, T *net, const Workspace<T> &w) const {
    switch (layer.kind) {
    case LayerKind::affine:
      return affine_forward(layer, inverse, x, y, w);
    case LayerKind::permute:
      return permute(layer, inverse, x, y);
    case LayerKind::linear:
      return linear_forward(layer, inverse, x, y, w);
    case LayerKind::activation:
      return activation_forward(layer, inverse, x, y, w);
    case LayerKind::coupling:
      if (sequential(layer))
        return sequential_forward(layer, x, y, net, w);
      evaluate(layer, x, w, net);
      return couple(layer, inverse, net, x, y, w);
    }
  }

  void copy_feature(const T *from, T *to) const {
    each(from, to, ld_, [](Pack<T> v) { return v; });
  }

  // A coupling whose net has been evaluated.
  void couple(const ProgramLayer &layer, bool inverse, const T *net, const T *x, T *y, const Workspace<T> &w) const {
    for (int64_t i = 0; i < layer.passed_count; ++i)
      copy_feature(x + layer.passed[i] * ld_, y + layer.passed[i] * ld_);
    transform(layer, 0, layer.transformed_count, inverse, net, x, y, w);
  }
  void couple_backward(const ProgramLayer &layer, const T *net, const T *x, const T *y, const T *g, T *gx,
                       const Workspace<T> &w) const {
    for (int64_t i = 0; i < layer.passed_count; ++i)
      copy_feature(g + layer.passed[i] * ld_, gx + layer.passed[i] * ld_);
    begin(w.net_gradients + layer.output_at * ld_, layer.raw_rows * ld_, false);
    for (int64_t i = 0; i < layer.transformed_count; ++i)
      transform_backward(layer, i, inverse_of(layer), net, x, y, g, gx, w);
  }

  // to[j] = from[index[j]], or the inverse
  void permute(const ProgramLayer &layer, bool inverse, const T *from, T *to) const {
    const int64_t *const index =
        layer.index != nullptr
            ? layer.index
            : static_cast<const int64_t *>(job_.parameters[layer.index_at.tensor]) + layer.index_at.offset;
    for (int64_t j = 0; j < p_.dim; ++j)
      copy_feature(from + (inverse ? j : index[j]) * ld_, to + (inverse ? index[j] : j) * ld_);
  }

  void affine_forward(const ProgramLayer &l, bool inverse, const T *x, T *y, const Workspace<T> &w) const {
    const T *const scale = packed_ + l.packed, *const shift = parameter(l.shift);
    with_order(l, inverse, [&](auto shift_first, auto backwards) {
      for (int64_t j = 0; j < p_.dim; ++j) {
        const Pack<T> s = scale[j], t = shift == nullptr ? T(0) : shift[j];
        each(x + j * ld_, y + j * ld_, ld_,
             [=](Pack<T> v) { return affine<decltype(shift_first)::value, decltype(backwards)::value>(v, t, s); });
      }
    });
    if (l.scale.present())
      add_logdet(w, inverse ? -scale[padded(p_.dim)] : scale[padded(p_.dim)]);
  }

  // Calls f with the order of shift and scale, and the direction, as compile-time constants.
  template <class F> static void with_order(const ProgramLayer &l, bool inverse, F &&f) {
    const auto with = [&](auto shift_first) {
      inverse ? f(shift_first, std::true_type()) : f(shift_first, std::false_type());
    };
    l.order == 0 ? with(std::false_type()) : with(std::true_type());
  }

  void affine_layer_backward(const ProgramLayer &l, bool inverse, const T *x, const T *y, const T *g, T *gx,
                             const T *grad_logdet, T *accumulator, bool add, int64_t rows) const {
    const int64_t dim = p_.dim;
    const T *const scale = packed_ + l.packed, *const shift = parameter(l.shift);
    T *const to_shift = accumulator + l.gradient, *const to_scale = to_shift + dim * 16;
    T *const to_logdet = to_shift + padded(2 * dim * 16);
    begin(to_shift, 2 * dim * 16, add), begin(to_logdet, 16, add);
    with_order(l, inverse, [&](auto shift_first, auto backwards) {
      constexpr bool first = decltype(shift_first)::value, back = decltype(backwards)::value;
      for (int64_t j = 0; j < dim; ++j) {
        const T s = scale[j], t = shift == nullptr || !first ? T(0) : shift[j];
        for (int64_t i = 0; i < ld_; i += block_size<T>) {
          // what is scaled, of the inverse map too: without what a shift that is not finite made of it
          const T *const gi = g + j * ld_ + i, *const plain = (back && !first ? y : x) + j * ld_ + i;
          T *const out = gx + j * ld_ + i, *const a = to_shift + j * 16, *const b = to_scale + j * 16;
#pragma omp simd
          for (int k = 0; k < block_size<T>; ++k) {
            const AffineGradient<T> e =
                affine_backward<first, back>(back && first ? plain[k] / s : plain[k] + t, s, gi[k]);
            out[k] = e.x;
            a[k] += math::select(i + k < rows, e.shift, T(0)); // as in sum_rows
            b[k] += math::select(i + k < rows, e.scale, T(0));
          }
        }
      }
    });
    sum_logdet(grad_logdet, inverse, to_logdet);
  }

  void sum_logdet(const T *grad_logdet, bool inverse, T *to) const {
    for (int64_t i = 0; i < ld_; i += block_size<T>)
      for (int k = 0; k < block_size<T>; ++k)
        to[k] += inverse ? -grad_logdet[i + k] : grad_logdet[i + k];
  }

  void linear_forward(const ProgramLayer &l, bool inverse, const T *x, T *y, const Workspace<T> &w) const {
    const int64_t dim = p_.dim;
    const T *const lower = packed_ + l.packed, *const upper = lower + padded(dim * dim);
    const T *const bias = parameter(l.shift), total = upper[padded(dim * dim)];
    T *const h = w.temporary;
    if (inverse) {
      for (int64_t i = 0; i < dim; ++i)
        for (int64_t r = 0; r < ld_; ++r)
          h[i * ld_ + r] = x[i * ld_ + r] - (bias == nullptr ? T(0) : bias[i]);
      solve(lower, dim, 1, true, h); // L h = x - bias
      copy(h, y, dim * ld_);
      solve(upper, dim, 1, false, y); // U y = h
    } else {
      multiply<T>({upper, dim, 1, dim, x, h, ld_, nullptr, false}, dim);
      multiply<T>({lower, dim, 1, dim, h, y, ld_, bias, false}, dim);
    }
    add_logdet(w, inverse ? -total : total);
  }

  // M z = z in place, M triangular with elements at m[i * row + j * column]: of its lower or upper triangle.
  void solve(const T *m, int64_t row, int64_t column, bool lower, T *z) const {
    const int64_t dim = p_.dim;
    for (int64_t step = 0; step < dim; ++step) {
      const int64_t i = lower ? step : dim - 1 - step;
      T *const zi = z + i * ld_;
      for (int64_t other = 0; other < step; ++other) {
        const int64_t j = lower ? other : dim - 1 - other;
        const T factor = m[i * row + j * column];
        const T *const zj = z + j * ld_;
#pragma omp simd
        for (int64_t r = 0; r < ld_; ++r)
          zi[r] -= factor * zj[r];
      }
      const T diagonal = m[i * row + i * column];
#pragma omp simd
      for (int64_t r = 0; r < ld_; ++r)
        zi[r] /= diagonal;
    }
  }

  // Accumulated: dL, dU as [dim, padded(dim)] each, the bias by lanes, the log-det by lanes. Of the inverse map the
  // gradients of L, U and the bias come with the opposite sign.
  void linear_backward(const ProgramLayer &l, bool inverse, const T *x, const T *y, const T *g, T *gx,
                       const Workspace<T> &w, T *accumulator, bool add, int64_t rows) const {
    const int64_t dim = p_.dim, lda = padded(dim);
    const T *const lower = packed_ + l.packed, *const upper = lower + padded(dim * dim);
    T *const to_lower = accumulator + l.gradient, *const to_upper = to_lower + dim * lda;
    T *const to_bias = to_upper + dim * lda, *const to_logdet = to_bias + dim * 16;
    T *const h = w.temporary, *const gh = h + dim * ld_;
    const T *const input = inverse ? y : x; // of U
    multiply<T>({upper, dim, 1, dim, input, h, ld_, nullptr, false}, dim);
    const T *outer_lower = g;
    if (inverse) {
      copy(g, gh, dim * ld_);
      solve(upper, 1, dim, true, gh); // U^T gh = g
      copy(gh, gx, dim * ld_);
      solve(lower, 1, dim, false, gx); // L^T gx = gh
      outer_lower = gx;
    } else {
      multiply<T>({lower, 1, dim, dim, g, gh, ld_, nullptr, false}, dim);
      multiply<T>({upper, 1, dim, dim, gh, gx, ld_, nullptr, false}, dim);
    }
    transpose(h, dim, ld_, w.turned, lda);
    outer<T>({outer_lower, ld_, w.turned, lda, rows, to_lower, add}, dim, dim);
    transpose(input, dim, ld_, w.turned, lda);
    outer<T>({gh, ld_, w.turned, lda, rows, to_upper, add}, dim, dim);
    begin(to_bias, dim * 16, add), begin(to_logdet, 16, add);
    sum_rows(outer_lower, dim, ld_, rows, to_bias);
    sum_logdet(w.grad_logdet, inverse, to_logdet);
  }

  void activation_forward(const ProgramLayer &l, bool inverse, const T *x, T *y, const Workspace<T> &w) const {
    const double log_slope = std::log(l.slope); // its error would be that of every feature
    const T slope = static_cast<T>(inverse ? 1 / l.slope : l.slope);
    const T gain = static_cast<T>(inverse ? -log_slope : log_slope);
    for (int64_t j = 0; j < p_.dim; ++j)
      for (int64_t i = 0; i < ld_; ++i) {
        const T value = x[j * ld_ + i];
        y[j * ld_ + i] = leaky(value, slope);
        if (l.exact)
          add_term(w.logdet[i], w.lost[i], value < T(0) ? gain : T(0));
      }
  }
  void activation_backward(const ProgramLayer &l, bool inverse, const T *x, const T *g, T *gx) const {
    const T slope = static_cast<T>(inverse ? 1 / l.slope : l.slope);
    for (int64_t i = 0; i < p_.dim * ld_; ++i)
      gx[i] = x[i] < T(0) ? slope * g[i] : g[i];
  }

  // The net of a coupling; leaves its values in `net`, the raw sizes of a spline multiplied by their gain.
  void evaluate(const ProgramLayer &layer, const T *x, const Workspace<T> &w, T *net) const {
    for (int64_t i = 0; i < layer.index_count; ++i)
      copy_feature(x + layer.index[i] * ld_, net + (layer.values[0].at + i) * ld_);
    for (int64_t k = 0; k < layer.step_count; ++k) {
      const ProgramStep &s = layer.steps[k];
      const T *const a = value(layer, net, w, s.a);
      T *const out = net + layer.values[2 + k].at * ld_;
      const int64_t count = layer.values[2 + k].rows * ld_;
      switch (s.kind) {
      case StepKind::dense:
        dense_forward(s, a, out);
        break;
      case StepKind::context:
        copy(w.context + s.first * ld_, out, count);
        break;
      case StepKind::act:
        activate<T>(s.activation, static_cast<T>(s.slope), a, out, count);
        break;
      case StepKind::add:
        add_values(a, value(layer, net, w, s.b), out, count);
        break;
      case StepKind::glu:
        gate_values(a, value(layer, net, w, s.b), out, count);
        break;
      case StepKind::concat: {
        const int64_t first = value_rows(layer, s.a) * ld_;
        copy(a, out, first);
        copy(value(layer, net, w, s.b), out + first, count - first);
      }
      }
    }
    for (int64_t i = 0; i < layer.transformed_count; ++i)
      scale_raw(layer, i, net);
  }

  // f(first output, outputs, where they begin in an accumulator of the weight) for each panel of a weight.
  template <class F> static void each_panel(const ProgramStep &s, const F &f) {
    for (int64_t first = 0; first < s.out; first += panel_width)
      f(first, smaller(panel_width, s.out - first), first * s.in);
  }

  void dense_forward(const ProgramStep &s, const T *a, T *out) const {
    const T *const matrix = weight(s), *const bias = parameter(s.bias);
    if (!s.panels)
      return multiply<T>({matrix, s.in, 1, s.in, a, out, ld_, bias, false}, s.out);
    each_panel(s, [&](int64_t first, int64_t width, int64_t at) {
      multiply<T>(
          {matrix + at, 1, width, s.in, a, out + first * ld_, ld_, bias == nullptr ? bias : bias + first, false},
          width);
    });
  }

  // The gradient of what a dense layer reads.
  void dense_backward(const ProgramStep &s, const T *d, T *ga, bool add) const {
    const T *const matrix = weight(s);
    if (!s.panels)
      return multiply<T>({matrix, 1, s.in, s.out, d, ga, ld_, nullptr, add}, s.in);
    each_panel(s, [&](int64_t first, int64_t width, int64_t at) {
      multiply<T>({matrix + at, width, 1, width, d + first * ld_, ga, ld_, nullptr, add || first > 0}, s.in);
    });
  }

  // The raw values of feature i as the transformer reads them.
  void scale_raw(const ProgramLayer &layer, int64_t i, T *net) const {
    if (layer.transformer != TransformerKind::spline)
      return;
    const int64_t at = i * layer.spline.count;
    T *const raw = net + (layer.raw_at + at) * ld_;
    if (layer.raw_at != layer.output_at)
      copy(net + (layer.output_at + at) * ld_, raw, layer.spline.count * ld_);
    scale_sizes(layer.spline, raw, ld_);
  }

  const T *value(const ProgramLayer &layer, const T *net, const Workspace<T> &w, int64_t id) const {
    return id == 1 ? w.context : net + layer.values[id].at * ld_;
  }
  int64_t value_rows(const ProgramLayer &layer, int64_t id) const {
    return id == 1 ? p_.context : layer.values[id].rows;
  }

  // The features [first, end) of those that a coupling transforms.
  void transform(const ProgramLayer &layer, int64_t first, int64_t end, bool inverse, const T *net, const T *x, T *y,
                 const Workspace<T> &w) const {
    const T *const raw = net + layer.raw_at * ld_;
    if (layer.transformer == TransformerKind::affine)
      return affine_transform(layer.affine, inverse, raw, layer.transformed, first, end, ld_, x, y, w.logdet, w.lost);
    for (int64_t i = first; i < end; ++i)
      spline_transform(layer.spline, inverse, raw + i * layer.spline.count * ld_, ld_, x + layer.transformed[i] * ld_,
                       y + layer.transformed[i] * ld_, w.logdet, w.lost, w.spline);
  }

  // Gradients of the raw values of feature i, added to w.net_gradients, and of its coordinate.
  void transform_backward(const ProgramLayer &layer, int64_t i, bool inverse, const T *net, const T *x, const T *y,
                          const T *g, T *gx, const Workspace<T> &w) const {
    const int64_t at = layer.transformed[i] * ld_;
    const T *const raw = net + layer.raw_at * ld_;
    T *const gradients = w.net_gradients + layer.output_at * ld_;
    if (layer.transformer == TransformerKind::affine) {
      affine_transform_backward(layer.affine, inverse, raw, gradients, i, ld_, inverse ? y + at : x + at, g + at,
                                w.grad_logdet, gx + at);
      return;
    }
    const int64_t first = i * layer.spline.count * ld_;
    T *const stored = w.net_gradients + layer.raw_at * ld_ + first;
    spline_transform_backward(layer.spline, inverse, raw + first, stored, ld_, x + at, g + at, w.grad_logdet, gx + at,
                              w.spline);
    if (layer.raw_at != layer.output_at)
      pass_gradient(stored, gradients + first, layer.spline.count * ld_, true);
  }

  void layer_backward(const ProgramLayer &layer, const T *x, const T *y, const T *net, const T *g, T *gx,
                      const Workspace<T> &w, T *accumulator, bool add, int64_t rows, bool context_grad) const {
    const bool inverse = inverse_of(layer);
    switch (layer.kind) {
    case LayerKind::affine:
      return affine_layer_backward(layer, inverse, x, y, g, gx, w.grad_logdet, accumulator, add, rows);
    case LayerKind::permute:
      return permute(layer, !inverse, g, gx);
    case LayerKind::linear:
      return linear_backward(layer, inverse, x, y, g, gx, w, accumulator, add, rows);
    case LayerKind::activation:
      return activation_backward(layer, inverse, x, g, gx);
    case LayerKind::coupling:
      if (sequential(layer))
        return sequential_backward(layer, x, y, net, g, gx, w, accumulator, add, rows, context_grad);
      couple_backward(layer, net, x, y, g, gx, w);
      return net_backward(layer, net, gx, w, accumulator, add, rows, context_grad);
    }
  }

  // Where the gradient of a value lies; null for a context whose gradient nobody wants.
  T *gradient_of(const ProgramLayer &layer, const Workspace<T> &w, int64_t id, bool context_grad) const {
    if (id == 1)
      return context_grad ? w.context_gradients : nullptr;
    return w.net_gradients + layer.values[id].at * ld_;
  }

  bool wanted(const ParameterRef &r) const { return r.present() && grads_[r.tensor] != nullptr; }

  // Gradients of a dense layer's weight and bias, where they are wanted; `turn`: whether w.turned does not hold a yet.
  // Gives whether it does.
  bool weight_backward(const ProgramStep &s, const T *a, const T *d, const Workspace<T> &w, T *accumulators, bool add,
                       int64_t rows, bool turn) const {
    T *const accumulator = accumulators + p_.layer_gradients;
    const int64_t lda = padded(s.in);
    const bool of_weight = wanted(s.weight);
    if (of_weight && s.panels) {
      each_panel(s, [&](int64_t first, int64_t width, int64_t at) { // [in, width]
        transpose(d + first * ld_, width, ld_, w.turned, padded(width));
        outer<T>({a, ld_, w.turned, padded(width), rows, accumulator + s.weight_gradient + at, add}, s.in, width);
      });
    } else if (of_weight) {
      if (turn)
        transpose(a, s.in, ld_, w.turned, lda);
      outer<T>({d, ld_, w.turned, lda, rows, accumulator + s.weight_gradient, add}, s.out, s.in);
    }
    if (wanted(s.bias)) {
      begin(accumulator + s.bias_gradient, s.out * 16, add);
      sum_rows(d, s.out, ld_, rows, accumulator + s.bias_gradient);
    }
    return of_weight ? !s.panels : !turn;
  }

  // From the gradients of the raw values to those of the weights, of the context, and of x, which are added to gx.
  void net_backward(const ProgramLayer &layer, const T *net, T *gx, const Workspace<T> &w, T *accumulator, bool add,
                    int64_t rows, bool context_grad) const {
    T *const gradients = w.net_gradients;
    // which values have a gradient so far: the first one to come is stored, the others are added
    constexpr int64_t most = 256;
    bool small[most];
    for (int64_t i = 0; i < 2 + layer.step_count && i < most; ++i)
      small[i] = false;
    if (2 + layer.step_count > most) { // then all are added
      for (int64_t i = 0; i < layer.net_rows * ld_; ++i)
        if (i < layer.output_at * ld_ || i >= (layer.output_at + layer.raw_rows) * ld_)
          gradients[i] = T(0);
    }
    const auto seen = [&](int64_t id) {
      if (id >= most || 2 + layer.step_count > most)
        return true;
      const bool before = small[id];
      small[id] = true;
      return before;
    };
    const auto target = [&](int64_t id) { return gradient_of(layer, w, id, context_grad); };
    small[1] = true; // the context has gradients of other layers
    for (int64_t k = 0; k < layer.step_count; ++k) {
      const int64_t at = layer.values[2 + k].at; // outputs come with theirs
      if (2 + k < most && at >= layer.output_at && at < layer.output_at + layer.raw_rows)
        small[2 + k] = true;
    }
    int64_t turned = -1;
    for (int64_t k = layer.step_count - 1; k >= 0; --k) {
      const ProgramStep &s = layer.steps[k];
      T *const d = gradients + layer.values[2 + k].at * ld_;
      const int64_t count = layer.values[2 + k].rows * ld_;
      if (!seen(2 + k)) { // nobody reads it
        for (int64_t i = 0; i < count; ++i)
          d[i] = T(0);
      }
      const T *const a = value(layer, net, w, s.a);
      T *const ga = target(s.a);
      switch (s.kind) {
      case StepKind::dense: {
        turned = weight_backward(s, a, d, w, accumulator, add, rows, turned != s.a) ? s.a : -1;
        if (ga != nullptr)
          dense_backward(s, d, ga, seen(s.a));
        break;
      }
      case StepKind::context:
        if (ga != nullptr)
          pass_gradient(d, ga + s.first * ld_, count, true);
        break;
      case StepKind::act: {
        const bool in_place = ga == d;
        if (ga != nullptr)
          activate_backward<T>(s.activation, static_cast<T>(s.slope), a, value(layer, net, w, 2 + k), d, ga, count,
                               seen(s.a) && !in_place);
        break;
      }
      case StepKind::add:
        if (ga != nullptr)
          pass_gradient(d, ga, count, seen(s.a));
        if (T *const gb = target(s.b))
          pass_gradient(d, gb, count, seen(s.b));
        break;
      case StepKind::glu: {
        const T *const b = value(layer, net, w, s.b);
        const bool add_a = seen(s.a);
        gate_backward(a, b, d, ga, count, add_a, target(s.b), seen(s.b));
        break;
      }
      case StepKind::concat: {
        const int64_t first = value_rows(layer, s.a) * ld_;
        if (ga != nullptr)
          pass_gradient(d, ga, first, seen(s.a));
        if (T *const gb = target(s.b))
          pass_gradient(d + first, gb, count - first, seen(s.b));
        break;
      }
      }
    }
    if (seen(0))
      for (int64_t i = 0; i < layer.index_count; ++i)
        pass_gradient(gradients + (layer.values[0].at + i) * ld_, gx + layer.index[i] * ld_, ld_, true);
  }

  // ---- sampling from an autoregressive layer

  // Rows that have an order: of every value and of the features.
  int64_t order_rows(const ProgramLayer &layer) const {
    int64_t rows = p_.dim + p_.context + layer.index_count;
    for (int64_t k = 0; k < layer.step_count; ++k)
      rows += value_rows(layer, 2 + k);
    return rows;
  }

  // In this order: the step that each row is known by; for each value its rows, sorted by that step; for each value and
  // step how many of its rows are known before it.
  int64_t order_size(const ProgramLayer &layer) const {
    return 2 * order_rows(layer) + (2 + layer.step_count) * (p_.dim + 2);
  }

  // The rows of a value that become known by a step, and all that are known by then.
  struct Known {
    const int32_t *rows;
    int64_t before, by;
  };
  Known known(const ProgramLayer &layer, int64_t id, int32_t step, const int32_t *orders) const {
    const int64_t rows = order_rows(layer);
    const int32_t *const counts = orders + 2 * rows + id * (p_.dim + 2) + step;
    return {orders + rows + order_of(layer, id), counts[0], counts[1]};
  }

  void sort_layer(const ProgramLayer &layer, int32_t *orders) const {
    for (int64_t id = 0; id < 2 + layer.step_count; ++id) {
      const int64_t at = order_of(layer, id), rows = id == 0 ? layer.index_count : value_rows(layer, id);
      int32_t *const sorted = orders + order_rows(layer) + at;
      int32_t *const counts = orders + 2 * order_rows(layer) + id * (p_.dim + 2);
      int32_t count = counts[0] = 0;
      for (int32_t step = 0; step <= p_.dim; ++step) {
        for (int64_t i = 0; i < rows; ++i)
          if (orders[at + i] == step)
            sorted[count++] = static_cast<int32_t>(i);
        counts[step + 1] = count;
      }
    }
  }

  // Whether a masked weight is NaN, which times a mask of 0 is NaN.
  bool masked_nan(const ProgramLayer &layer) const {
    int found = 0;
    for (int64_t k = 0; k < layer.step_count; ++k) {
      const ProgramStep &s = layer.steps[k];
      for (int64_t i = 0; s.packed >= 0 && i < s.in * s.out; ++i)
        found |= masked_[s.packed + i] != masked_[s.packed + i];
    }
    return found != 0;
  }

  // Where the orders of a value begin: features, context, then the steps.
  int64_t order_of(const ProgramLayer &layer, int64_t id) const {
    if (id == 0)
      return p_.dim;
    if (id == 1)
      return p_.dim + layer.index_count;
    int64_t at = p_.dim + layer.index_count + p_.context;
    for (int64_t k = 0; k < id - 2; ++k)
      at += value_rows(layer, 2 + k);
    return at;
  }

  static constexpr int32_t unknown = 1 << 30;

  // When each row is known: features[j] is the step that finds feature j, from raw values that are known by then.
  void order_layer(const ProgramLayer &layer, int32_t *orders) const {
    const int64_t size = order_rows(layer);
    for (int64_t i = 0; i < size; ++i)
      orders[i] = unknown;
    for (int64_t i = 0; i < p_.context; ++i)
      orders[order_of(layer, 1) + i] = 0;
    for (int32_t step = 0; step < p_.dim; ++step) {
      for (int64_t k = 0; k < layer.step_count; ++k)
        order_step(layer, k, step, orders);
      bool found = false;
      for (int64_t j = 0; j < p_.dim; ++j)
        if (orders[j] == unknown && raw_known(layer, j, step, orders))
          orders[j] = step, found = true;
      if (!found)
        return;
      for (int64_t j = 0; j < p_.dim; ++j)
        if (orders[j] <= step)
          orders[p_.dim + j] = orders[j] + 1;
    }
  }

  void order_step(const ProgramLayer &layer, int64_t k, int32_t step, int32_t *orders) const {
    const ProgramStep &s = layer.steps[k];
    int32_t *const out = orders + order_of(layer, 2 + k);
    const int32_t *const a = orders + order_of(layer, s.a), *const b = orders + order_of(layer, s.b);
    const int64_t rows = value_rows(layer, 2 + k), first = value_rows(layer, s.a);
    for (int64_t i = 0; i < rows; ++i) {
      if (out[i] <= step)
        continue;
      bool known = true;
      if (s.kind == StepKind::dense)
        for (int64_t j = 0; j < s.in && known; ++j)
          known = a[j] <= step || (s.mask.present() && !mask_at(s.mask, i * s.in + j));
      else if (s.kind == StepKind::concat)
        known = (i < first ? a[i] : b[i - first]) <= step;
      else
        known = a[i] <= step && (s.kind == StepKind::act || b[i] <= step);
      if (known)
        out[i] = step;
    }
  }

  bool raw_known(const ProgramLayer &layer, int64_t feature, int32_t step, const int32_t *orders) const {
    const auto known = [&](int64_t raw) {
      for (int64_t k = 0; k < layer.step_count; ++k) {
        const ProgramValue &v = layer.values[2 + k];
        const int64_t row = layer.output_at + raw - v.at;
        if (row >= 0 && row < v.rows && v.at >= layer.output_at && v.at < layer.output_at + layer.raw_rows)
          return orders[order_of(layer, 2 + k) + row] <= step;
      }
      return false;
    };
    if (layer.transformer == TransformerKind::affine)
      return known(layer.affine.shift_at + feature * layer.affine.shift_step) &&
             (layer.affine.scale_at < 0 || known(layer.affine.scale_at + feature * layer.affine.scale_step));
    for (int64_t i = 0; i < layer.spline.count; ++i)
      if (!known(feature * layer.spline.count + i))
        return false;
    return true;
  }

  // Feature by feature; every row of every value is computed once, as soon as what it needs is known.
  void sequential_forward(const ProgramLayer &layer, const T *x, T *y, T *net, const Workspace<T> &w) const {
    const int32_t *const orders = orders_of(layer);
    if (hidden_nan_)
      begin(net, layer.net_rows * ld_, false);
    for (int32_t step = 0; step <= p_.dim; ++step) {
      for (int64_t j = 0; j < p_.dim; ++j)
        if (orders[j] + 1 == step)
          copy_feature(y + j * ld_, net + (layer.values[0].at + j) * ld_);
      for (int64_t k = 0; k < layer.step_count; ++k)
        sequential_step(layer, k, step, orders, net, w);
      for (int64_t j = 0; j < p_.dim; ++j)
        if (orders[j] == step) {
          scale_raw(layer, j, net);
          transform(layer, j, j + 1, true, net, x, y, w);
        }
    }
  }

  void sequential_step(const ProgramLayer &layer, int64_t k, int32_t step, const int32_t *orders, T *net,
                       const Workspace<T> &w) const {
    const ProgramStep &s = layer.steps[k];
    const Known here = known(layer, 2 + k, step, orders);
    const T *const a = value(layer, net, w, s.a);
    T *const out = net + layer.values[2 + k].at * ld_;
    if (s.kind == StepKind::dense) {
      const Known of_a = known(layer, s.a, hidden_nan_ ? static_cast<int32_t>(p_.dim) : step, orders); // all in the end
      multiply_rows<T>({weight(s), parameter(s.bias), s.in, a, out, ld_, of_a.rows, of_a.by}, here.rows + here.before,
                       here.by - here.before);
      return;
    }
    const int64_t first = value_rows(layer, s.a);
    const T *const b = s.kind == StepKind::act ? nullptr : value(layer, net, w, s.b);
    for (int64_t place = here.before; place < here.by; ++place) {
      const int64_t i = here.rows[place];
      T *const to = out + i * ld_;
      if (s.kind == StepKind::act)
        activate<T>(s.activation, static_cast<T>(s.slope), a + i * ld_, to, ld_);
      else if (s.kind == StepKind::add)
        add_values(a + i * ld_, b + i * ld_, to, ld_);
      else if (s.kind == StepKind::glu)
        gate_values(a + i * ld_, b + i * ld_, to, ld_);
      else
        copy(i < first ? a + i * ld_ : b + (i - first) * ld_, to, ld_);
    }
  }

  const int32_t *orders_of(const ProgramLayer &layer) const {
    const int32_t *orders = orders_;
    for (const ProgramLayer *l = p_.layers; l != &layer; ++l)
      if (sequential(*l))
        orders += order_size(*l);
    return orders;
  }

  // The same order backwards: the gradient of a feature is complete once all rows that are known after it have theirs.
  void sequential_backward(const ProgramLayer &layer, const T *x, const T *y, const T *net, const T *g_in, T *gx,
                           const Workspace<T> &w, T *accumulator, bool add, int64_t rows, bool context_grad) const {
    const int32_t *const orders = orders_of(layer);
    T *const gradients = w.net_gradients, *const g = w.temporary;
    for (int64_t i = 0; i < layer.net_rows * ld_; ++i)
      gradients[i] = T(0);
    for (int64_t step = p_.dim; step >= 0; --step) {
      for (int64_t j = 0; j < p_.dim; ++j)
        if (orders[j] == step) {
          const T *const from_net = gradients + (layer.values[0].at + j) * ld_;
          for (int64_t r = 0; r < ld_; ++r)
            g[j * ld_ + r] = g_in[j * ld_ + r] + from_net[r];
          transform_backward(layer, j, true, net, x, y, g, gx, w);
        }
      for (int64_t k = layer.step_count - 1; k >= 0; --k)
        sequential_step_backward(layer, k, step, orders, net, w, context_grad);
    }
    for (int64_t k = 0; k < layer.step_count; ++k)
      if (layer.steps[k].kind == StepKind::dense)
        weight_backward(layer.steps[k], value(layer, net, w, layer.steps[k].a),
                        gradients + layer.values[2 + k].at * ld_, w, accumulator, add, rows, true);
  }

  void sequential_step_backward(const ProgramLayer &layer, int64_t k, int64_t step, const int32_t *orders, const T *net,
                                const Workspace<T> &w, bool context_grad) const {
    const ProgramStep &s = layer.steps[k];
    const int32_t *const order = orders + order_of(layer, 2 + k);
    const T *const a = value(layer, net, w, s.a), *const out = value(layer, net, w, 2 + k);
    T *const d = w.net_gradients + layer.values[2 + k].at * ld_;
    T *const ga = gradient_of(layer, w, s.a, context_grad), *const gb = gradient_of(layer, w, s.b, context_grad);
    const int64_t first = value_rows(layer, s.a);
    for (int64_t i = 0; i < layer.values[2 + k].rows; ++i) {
      if (order[i] != step)
        continue;
      const T *const di = d + i * ld_;
      if (s.kind == StepKind::dense) {
        const T *const row = weight(s) + i * s.in;
        for (int64_t j = 0; j < s.in && ga != nullptr; ++j)
          if (const T factor = row[j]; factor != T(0))
#pragma omp simd
            for (int64_t r = 0; r < ld_; ++r)
              ga[j * ld_ + r] += factor * di[r];
      } else if (s.kind == StepKind::act) {
        if (ga != nullptr)
          activate_backward<T>(s.activation, static_cast<T>(s.slope), a + i * ld_, out + i * ld_, di, ga + i * ld_, ld_,
                               ga != d);
      } else if (s.kind == StepKind::glu) {
        gate_backward(a + i * ld_, value(layer, net, w, s.b) + i * ld_, di, ga == nullptr ? nullptr : ga + i * ld_, ld_,
                      true, gb == nullptr ? nullptr : gb + i * ld_, true);
      } else {
        const bool concat = s.kind == StepKind::concat;
        if (ga != nullptr && (!concat || i < first))
          pass_gradient(di, ga + i * ld_, ld_, true);
        if (gb != nullptr && (!concat || i >= first))
          pass_gradient(di, gb + (concat ? i - first : i) * ld_, ld_, true);
      }
    }
  }

  const ProgramJob<T> &job_;
  const ProgramView &p_;
  int64_t ld_;
  T *packed_ = nullptr, *masked_ = nullptr;
  const int32_t *orders_ = nullptr;
  bool hidden_nan_ = false;
  T *const *grads_ = nullptr;
};

// Sum over accumulators in order.
template <class T> T total(const T *accumulators, int64_t stride, int64_t count) {
  T sum = T(0);
  for (int64_t a = 0; a < count; ++a)
    sum += accumulators[a * stride];
  return sum;
}

// put(i, sum) for each i of n: the sum of its lanes, 16 apart, over accumulators.
template <class T, class F>
void sum_lanes(const T *accumulators, int64_t stride, int64_t count, int64_t n, const F &put) {
  constexpr int wide = lanes<T>;
  for (int64_t first = 0; first < n; first += wide) {
    const int64_t here = smaller(wide, n - first);
    vec<T> rows[wide]; // a row of lanes for each i, then a row of the i for each lane
    for (int64_t i = 0; i < wide; ++i) {
      rows[i] = vec<T>{};
      for (int64_t a = 0; a < count && i < here; ++a)
        for (int l = 0; l < block_size<T>; l += wide)
          rows[i] += load(accumulators + a * stride + (first + i) * 16 + l);
    }
    transpose_stage<T, 1>(rows);
    vec<T> sum = rows[0];
    for (int l = 1; l < wide; ++l)
      sum += rows[l];
    alignas(64) T sums[wide];
    store(sums, sum);
    for (int64_t i = 0; i < here; ++i)
      put(first + i, sums[i]);
  }
}

// factor(i) times the sum of n elements over accumulators; a factor of 0 gives 0.
template <class T, class F>
void sum_rows_of(const T *accumulators, int64_t stride, int64_t count, int64_t n, T *to, bool add, const F &factor) {
  alignas(64) T sums[block_size<T>];
  for (int64_t first = 0; first < n; first += block_size<T>) {
    for (int64_t i = 0; i < block_size<T>; i += lanes<T>) {
      vec<T> sum = load(accumulators + first + i);
      for (int64_t a = 1; a < count; ++a)
        sum += load(accumulators + a * stride + first + i);
      store(sums + i, sum);
    }
    const int64_t here = smaller(block_size<T>, n - first);
    for (int64_t i = 0; i < here; ++i) {
      const T f = factor(first + i), sum = math::select(f != T(0), f * sums[i], T(0));
      to[first + i] = add ? to[first + i] + sum : sum;
    }
  }
}

template <class T>
void Program<T>::reduce(const ProgramBackwardJob<T> &job, int64_t index, const T *accumulators, int64_t stride,
                        int64_t count, bool add) const {
  const ProgramLayer &l = p_.layers[index];
  const int64_t dim = p_.dim;
  const bool inverse = inverse_of(l);
  const auto gradient = [&](const ParameterRef &r) -> T * {
    return r.present() && job.grads[r.tensor] != nullptr ? job.grads[r.tensor] + r.offset : nullptr;
  };
  const auto put = [&](T *to, T value) { *to = add ? *to + value : value; };
  const T *const from = accumulators + l.gradient;
  if (l.kind == LayerKind::coupling) {
    for (int64_t k = 0; k < l.step_count; ++k) {
      const ProgramStep &s = l.steps[k];
      if (s.kind != StepKind::dense)
        continue;
      const int64_t lda = padded(s.in);
      const T *const nets = accumulators + p_.layer_gradients;
      if (T *const to = gradient(s.weight); to != nullptr && s.panels) {
        each_panel(s, [&](int64_t, int64_t width, int64_t at) {
          for (int64_t i = 0; i < s.in; ++i)
            sum_rows_of(nets + s.weight_gradient + at + i * padded(width), stride, count, width, to + at + i * width,
                        add, [](int64_t) { return T(1); });
        });
      } else if (to != nullptr) {
        for (int64_t o = 0; o < s.out; ++o) {
          T *const row = to + o * s.in;
          const T *const first = nets + s.weight_gradient + o * lda;
          const auto sum = [&](auto factor) { sum_rows_of(first, stride, count, s.in, row, add, factor); };
          const int64_t at = s.mask.offset + o * s.in;
          if (!s.mask.present())
            sum([](int64_t) { return T(1); });
          else if (job_.bool_mask[s.mask.tensor])
            sum([mask = static_cast<const uint8_t *>(job_.parameters[s.mask.tensor]) + at](int64_t i) {
              return T(mask[i] != 0);
            });
          else
            sum([mask = static_cast<const T *>(job_.parameters[s.mask.tensor]) + at](int64_t i) { return mask[i]; });
        }
      }
      if (T *const to = gradient(s.bias))
        sum_lanes(nets + s.bias_gradient, stride, count, s.out, [&](int64_t o, T sum) { put(to + o, sum); });
    }
  } else if (l.kind == LayerKind::affine) {
    const T *const scale = packed_ + l.packed, *const raw = parameter(l.scale);
    if (T *const to = gradient(l.shift))
      sum_lanes(from, stride, count, dim, [&](int64_t j, T sum) { put(to + j, sum); });
    if (T *const to = gradient(l.scale)) {
      T logdet = T(0);
      sum_lanes(from + padded(2 * dim * 16), stride, count, 1, [&](int64_t, T sum) { logdet = sum; });
      sum_lanes(from + dim * 16, stride, count, dim,
                [&](int64_t j, T sum) { put(to + j, scale_gradient(l.form, raw[j], scale[j], sum, logdet)); });
    }
  } else if (l.kind == LayerKind::linear) {
    const int64_t lda = padded(dim);
    const T sign = inverse ? T(-1) : T(1);
    const T *const of_upper = from + dim * lda, *const of_bias = of_upper + dim * lda;
    const T *const upper = packed_ + l.packed + padded(dim * dim);
    const T *const raw = parameter(l.storage == 0 ? l.scale : l.lower);
    T logdet = T(0);
    sum_lanes(of_bias + dim * 16, stride, count, 1, [&](int64_t, T sum) { logdet = sum; });
    T *const to_lower = gradient(l.lower), *const to_upper = gradient(l.storage == 0 ? l.upper : l.lower);
    T *const to_diagonal = gradient(l.storage == 0 ? l.scale : l.lower);
    int64_t below = 0, above = 0;
    for (int64_t i = 0; i < dim; ++i)
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t at = i * dim + j, place = i * lda + j;
        if (j < i && to_lower != nullptr)
          put(to_lower + (l.storage == 0 ? below++ : at), sign * total(from + place, stride, count));
        else if (j > i && to_upper != nullptr)
          put(to_upper + (l.storage == 0 ? above++ : at), sign * total(of_upper + place, stride, count));
        else if (j == i && to_diagonal != nullptr)
          put(to_diagonal + (l.storage == 0 ? i : at),
              scale_gradient(l.form, raw[l.storage == 0 ? i : at], upper[at],
                             sign * total(of_upper + place, stride, count), logdet));
      }
    if (T *const to = gradient(l.shift))
      sum_lanes(of_bias, stride, count, dim, [&](int64_t j, T sum) { put(to + j, sign * sum); });
  }
}

// ---- the wide walk

// Gradients of weights of more bytes than this leave the caches before anyone reads them.
constexpr int64_t cached_gradients = 16 * 1024 * 1024;

// Rows that pass a net together: their activations stay in the second cache of a core.
constexpr int64_t chunk_rows = 256;

// Elements of `saved` behind the tapes: raw values and activations of every net, for Keep::all.
template <class T> int64_t saved_of_nets(const ProgramView &program, int64_t batch) {
  int64_t stride = 0;
  for (int64_t i = 0; i < program.layer_count; ++i)
    stride += program.layers[i].kept_stride[row_type<T>];
  return stride * batch;
}

// Walks net by net. Each tile keeps its values in memory of its own, and takes all layers up to the next net at once.
template <class T> class WideWalk {
public:
  // Cuts the workspace of a call; with workspace null it only counts.
  WideWalk(const ProgramJob<T> &job, Program<T> &program, bool backward)
      : job_(job), p_(job.program), program_(program), backward_(backward), ld_(program.ld()),
        tiles_(tile_count(job.batch)), parts_(smaller(tiles_, most_parts)),
        team_{program_sharing<T>(job, backward), job.parallel}, pieces_{job.workspace} {
    const Keep keep = job.keep;
    const bool kept = keep == Keep::all, again = backward && keep == Keep::nothing;
    Widths most;
    for (int64_t i = 0; i < p_.layer_count; ++i)
      most.add(p_.layers[i]);
    const int64_t chunk = smaller(job.batch, chunk_rows);
    packed_ = pieces_.take(p_.packed_size);
    for (T *&f : features_)
      f = pieces_.take(job.batch * row_stride<T>(p_.dim));
    context_ = pieces_.take(p_.reads_context ? job.batch * row_stride<T>(p_.context) : 0);
    net_values_ = pieces_.take(kept ? 0 : chunk * (backward ? most.kept : most.work));
    values_ = pieces_.take(keeps_tape(keep) ? 0 : tiles_ * (again ? p_.layer_count + 1 : 2) * p_.dim * ld_);
    logdets_ = pieces_.take(2 * tiles_ * ld_);
    for (int64_t part = 0; part < parts_; ++part)
      workspaces_[part] = workspace_of(pieces_, p_, ld_, 0, most.tile, backward);
    if (!backward)
      return;
    gradients_ = pieces_.take(2 * tiles_ * p_.dim * ld_);
    grad_logdets_ = pieces_.take(tiles_ * ld_);
    net_gradients_ = pieces_.take(chunk * most.gradient);
    accumulators_ = pieces_.take(parts_ * padded(p_.layer_gradients));
  }

  int64_t size() const { return pieces_.used; }

  void forward() {
    program_.pack(packed_);
    fill_context();
    const bool tape = keeps_tape(job_.keep);
    walk(tape ? job_.saved : values_, tape, true);
  }

  // `add`: to what the gradients of parameters hold.
  void backward(const ProgramBackwardJob<T> &whole, bool add) {
    whole_ = &whole, add_ = add || p_.shared;
    program_.pack(packed_);
    fill_context();
    if (job_.keep == Keep::nothing)
      walk(values_, true, false);
    else
      values_at_ = keeps_tape(job_.keep) ? job_.saved : values_, tape_ = keeps_tape(job_.keep);
    begin(accumulators_, parts_ * padded(p_.layer_gradients), false);
    if (whole.grad_context != nullptr)
      begin(whole.grad_context, job_.batch * p_.context, false);
    over_tiles(0, tiles_, [&](int64_t tile, const auto &w) { enter_backward(tile, w); });
    for (int64_t position = p_.layer_count - 1; position >= 0; --position)
      if (has_net(position))
        each_chunk([&](int64_t tile, int64_t end) { net_backward(position, tile, end); });
    for (int64_t l = 0; l < p_.layer_count; ++l)
      if (p_.layers[l].kind != LayerKind::coupling)
        program_.reduce(whole, l, accumulators_, padded(p_.layer_gradients), parts_, add_);
  }

private:
  static constexpr int64_t most_parts = 8;
  using Space = Workspace<T>;

  // Elements of a row, the most of any net; `tile`: rows of what tiles read and write of a net.
  struct Widths {
    int64_t kept = 0, work = 0, gradient = 0, tile = 0;
    void add(const ProgramLayer &l) {
      constexpr int type = row_type<T>;
      kept = larger(kept, l.kept_stride[type]), work = larger(work, l.work_stride[type]);
      gradient = larger(gradient, l.gradient_stride[type]),
      tile = larger(tile, larger(l.output_at, l.raw_at) + l.raw_rows);
    }
  };

  bool has_net(int64_t position) const { return program_.layer_at(position).kind == LayerKind::coupling; }

  WideNet<T> net_of(const ProgramLayer &layer) const {
    const bool past = p_.net_gradients * static_cast<int64_t>(sizeof(T)) > cached_gradients;
    return {layer, job_.parameters, job_.bool_mask, whole_ == nullptr ? nullptr : whole_->grads, p_.shared, past};
  }

  // f(tile, workspace) for some tiles. The tiles of a part come in order and share its accumulator, whoever runs it.
  template <class F> void over_tiles(int64_t begin, int64_t end, const F &f) const {
    const bool few = (end - begin) * ld_ * p_.dim < 1024; // a second thread would gain nothing
    run(few ? Team{1, nullptr} : team_, parts_, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        for (int64_t tile = begin + (part - begin % parts_ + parts_) % parts_; tile < end; tile += parts_) {
          Space w = workspaces_[part];
          w.logdet = logdets_ + 2 * tile * ld_, w.lost = w.logdet + ld_;
          if (backward_)
            w.grad_logdet = grad_logdets_ + tile * ld_;
          f(tile, w);
        }
    });
  }

  // f(first tile, last tile) for the tiles of each chunk of rows.
  template <class F> void each_chunk(const F &f) const {
    const int64_t tiles = ceil_div(tiles_, ceil_div(job_.batch, chunk_rows));
    for (int64_t tile = 0; tile < tiles_; tile += tiles)
      f(tile, smaller(tile + tiles, tiles_));
  }

  // The input of the layer at `position`, in memory for two values in turn or for all.
  T *value(int64_t tile, int64_t position) const {
    const int64_t values = tape_ ? p_.layer_count + 1 : 2;
    return values_at_ + (tile * values + (tape_ ? position : position & 1)) * p_.dim * ld_;
  }
  T *gradient(int64_t tile, int64_t position) const { return gradients_ + (tile * 2 + (position & 1)) * p_.dim * ld_; }
  int64_t rows_of(int64_t tile) const { return program_.first_row(tile + 1) - program_.first_row(tile); }

  // The features that the net at `position` reads, all rows. Those of two nets in turn lie apart: one is filled while
  // the other is read.
  T *features_of_net(int64_t position) const {
    int64_t before = 0;
    for (int64_t i = 0; i < position; ++i)
      before += has_net(i);
    return features_[before & 1];
  }

  // Rows of a net: those of the tiles [tile, end). `again`: all values are wanted, by backward.
  NetRows<T> rows_at(int64_t position, int64_t tile, int64_t end, bool again) const {
    const ProgramLayer &layer = program_.layer_at(position);
    const int64_t first = program_.first_row(tile);
    NetRows<T> at{};
    at.rows = program_.first_row(end) - first;
    at.features = features_of_net(position) + first * row_place<T>(layer, 0).stride;
    at.context = context_ + first * row_stride<T>(p_.context);
    at.gradients = net_gradients_;
    at.values = net_values_, at.capacity = at.rows, at.kept = again;
    if (job_.keep == Keep::all) {
      at.values = job_.saved + tiles_ * (p_.layer_count + 1) * p_.dim * ld_;
      for (const ProgramLayer *l = p_.layers; l != &layer; ++l)
        at.values += l->kept_stride[row_type<T>] * job_.batch;
      at.capacity = job_.batch, at.first = first, at.kept = true;
    }
    return at;
  }

  // What the net at `position` reads, from the value that its coupling has or makes: conditioning features are the
  // same.
  void fill(int64_t tile, int64_t position, const T *from) const {
    const ProgramLayer &l = program_.layer_at(position);
    const int64_t first = program_.first_row(tile), rows = rows_of(tile), stride = row_place<T>(l, 0).stride;
    T *const features = features_of_net(position);
    for (int64_t i = 0; i < stride; ++i) {
      const T *const feature = i < l.index_count ? from + l.index[i] * ld_ : nullptr;
      for (int64_t r = 0; r < rows; ++r)
        features[(first + r) * stride + i] = feature != nullptr ? feature[r] : T(0);
    }
  }
  void fill_context() const {
    const int64_t stride = row_stride<T>(p_.context);
    for (int64_t r = 0; p_.reads_context && r < job_.batch; ++r)
      for (int64_t i = 0; i < stride; ++i)
        context_[r * stride + i] = i < p_.context ? job_.context[r * p_.context + i] : T(0);
  }

  // f(matrix of an output or its gradient, stride, features, their rows in a tile)
  template <class F> static void each_output(const ProgramLayer &l, const F &f) {
    for (int64_t i = 0; i < l.output_count; ++i) {
      const ProgramValue &v = l.values[l.outputs[i]];
      f(l.outputs[i], row_place<T>(l, l.outputs[i]).stride, v.rows, v.at);
    }
  }

  // The raw values of a tile, from rows to lanes. Lanes beyond the batch get 0.
  void take_raw(const NetRows<T> &at, const ProgramLayer &l, int64_t tile, int64_t first_tile, const Space &w) const {
    const int64_t rows = rows_of(tile), row = program_.first_row(tile) - program_.first_row(first_tile);
    each_output(l, [&](int64_t id, int64_t stride, int64_t count, int64_t to_row) {
      for (int64_t j = 0; j < count; ++j) {
        const T *const from = value_at(l, at, id) + row * stride + j;
        T *const to = w.net + (to_row + j) * ld_;
        each(to, to, ld_, [](Pack<T>) { return Pack<T>(T(0)); });
        for (int64_t r = 0; r < rows; ++r)
          to[r] = from[r * stride];
      }
    });
    for (int64_t i = 0; i < l.transformed_count; ++i)
      program_.scale_raw(l, i, w.net);
  }

  void walk(T *values, bool tape, bool results) {
    values_at_ = values, tape_ = tape;
    over_tiles(0, tiles_, [&](int64_t tile, const Space &w) {
      program_.read(job_.x, p_.dim, program_.first_row(tile), rows_of(tile), value(tile, 0));
      begin(w.logdet, 2 * ld_, false);
      advance(tile, 0, w, results);
    });
    for (int64_t position = 0; position < p_.layer_count; ++position)
      if (has_net(position))
        each_chunk([&](int64_t first, int64_t end) {
          const ProgramLayer &layer = program_.layer_at(position);
          const NetRows<T> at = rows_at(position, first, end, false);
          wide_net_forward(team_, net_of(layer), at);
          over_tiles(first, end, [&](int64_t tile, const Space &w) {
            take_raw(at, layer, tile, first, w);
            program_.couple(layer, program_.inverse_of(layer), w.net, value(tile, position), value(tile, position + 1),
                            w);
            advance(tile, position + 1, w, results);
          });
        });
  }

  // Through the layers up to the next net, or to the end.
  void advance(int64_t tile, int64_t position, const Space &w, bool results) const {
    for (; position < p_.layer_count && !has_net(position); ++position) {
      const ProgramLayer &l = program_.layer_at(position);
      program_.layer_forward(l, program_.inverse_of(l), value(tile, position), value(tile, position + 1), w.net, w);
    }
    if (position < p_.layer_count)
      fill(tile, position, value(tile, position));
    else if (results)
      program_.finish(value(tile, position), tile, w);
  }

  void enter_backward(int64_t tile, const Space &w) const {
    const int64_t first = program_.first_row(tile), rows = rows_of(tile), last = p_.layer_count;
    begin(w.logdet, 2 * ld_, false);
    if (job_.keep == Keep::output)
      program_.read(job_.saved, p_.dim, first, rows, value(tile, last));
    program_.begin_gradient(*whole_, tile, value(tile, last), w, gradient(tile, last));
    retreat(tile, last - 1, w);
  }

  // Back through the layers down to the net before, or to the start.
  void retreat(int64_t tile, int64_t position, const Space &w) const {
    T *const accumulator = accumulators_ + tile % parts_ * padded(p_.layer_gradients);
    for (; position >= 0 && !has_net(position); --position) {
      const ProgramLayer &l = program_.layer_at(position);
      if (job_.keep == Keep::output)
        program_.layer_forward(l, !program_.inverse_of(l), value(tile, position + 1), value(tile, position), w.net, w);
      program_.layer_backward(l, value(tile, position), value(tile, position + 1), w.net, gradient(tile, position + 1),
                              gradient(tile, position), w, accumulator, true, rows_of(tile), false);
    }
    if (position >= 0)
      fill(tile, position, value(tile, job_.keep == Keep::output ? position + 1 : position));
    else
      program_.write(gradient(tile, 0), p_.dim, program_.first_row(tile), rows_of(tile), whole_->grad_x);
  }

  void net_backward(int64_t position, int64_t first, int64_t end) const {
    const ProgramLayer &l = program_.layer_at(position);
    const WideNet<T> net = net_of(l);
    const NetRows<T> at = rows_at(position, first, end, true);
    const bool of_context = whole_->grad_context != nullptr && l.reads_context;
    if (job_.keep != Keep::all)
      wide_net_forward(team_, net, at);
    over_tiles(first, end, [&](int64_t tile, const Space &w) {
      T *const x = value(tile, position), *const y = value(tile, position + 1);
      take_raw(at, l, tile, first, w);
      if (job_.keep == Keep::output)
        program_.couple(l, !program_.inverse_of(l), w.net, y, x, w);
      program_.couple_backward(l, w.net, x, y, gradient(tile, position + 1), gradient(tile, position), w);
      const int64_t row = program_.first_row(tile) - program_.first_row(first);
      each_output(l, [&](int64_t id, int64_t stride, int64_t count, int64_t from_row) {
        T *const to = gradient_at(l, at, id) + row * stride;
        for (int64_t r = 0; r < rows_of(tile); ++r)
          for (int64_t j = 0; j < stride; ++j)
            to[r * stride + j] = j < count ? w.net_gradients[(from_row + j) * ld_ + r] : T(0);
      });
    });
    wide_net_backward(team_, net, at, add_ || first > 0, of_context);
    over_tiles(first, end, [&](int64_t tile, const Space &w) {
      T *const g = gradient(tile, position);
      const int64_t begin = program_.first_row(tile), row = begin - program_.first_row(first);
      const int64_t stride = row_place<T>(l, 0).stride, context_stride = row_place<T>(l, 1).stride;
      for (int64_t r = 0; r < rows_of(tile); ++r) {
        const T *const from = gradient_at(l, at, 0) + (row + r) * stride;
        for (int64_t i = 0; l.reads_features && i < l.index_count; ++i)
          g[l.index[i] * ld_ + r] += from[i];
        const T *const from_context = gradient_at(l, at, 1) + (row + r) * context_stride;
        for (int64_t i = 0; of_context && i < p_.context; ++i)
          whole_->grad_context[(begin + r) * p_.context + i] += from_context[i];
      }
      retreat(tile, position - 1, w);
    });
  }

  const ProgramJob<T> &job_;
  const ProgramView &p_;
  Program<T> &program_;
  const ProgramBackwardJob<T> *whole_ = nullptr;
  bool backward_, tape_ = false, add_ = false;
  int64_t ld_, tiles_, parts_;
  Team team_;
  Pieces<T> pieces_;
  Space workspaces_[most_parts];
  T *packed_, *features_[2], *context_, *net_values_, *values_, *logdets_, *values_at_ = nullptr;
  T *gradients_ = nullptr, *grad_logdets_ = nullptr, *net_gradients_ = nullptr, *accumulators_ = nullptr;
};

// ---- the tile walk

// How the workspace of a call is cut.
template <class T> struct Memory {
  T *packed, *masked, *orders, *accumulators, *threads;
  int64_t thread_size, pieces, stride;

  Memory(const ProgramJob<T> &job, bool backward, int64_t &size) {
    Pieces<T> pieces_of{job.workspace};
    const ProgramView &p = job.program;
    packed = pieces_of.take(p.packed_size), masked = pieces_of.take(p.masked_size);
    orders = pieces_of.take(ceil_div(Program<T>(job).order_size() * (int64_t)sizeof(int32_t), sizeof(T)));
    pieces = backward ? accumulator_count(p, job.batch) : smaller(tile_count(job.batch), larger(job.threads, 1));
    stride = padded(p.layer_gradients + p.net_gradients);
    accumulators = pieces_of.take(backward ? pieces * stride : 0);
    Pieces<T> one{nullptr};
    workspace_of(one, p, leading<T>(job.batch), tape(job, backward), p.net_rows, backward);
    thread_size = one.used;
    threads = pieces_of.take(pieces * thread_size);
    size = pieces_of.used;
  }

  Workspace<T> of_piece(const ProgramJob<T> &job, int64_t piece, bool backward) const {
    Pieces<T> pieces_of{threads + piece * thread_size};
    return workspace_of(pieces_of, job.program, leading<T>(job.batch), tape(job, backward), job.program.net_rows,
                        backward);
  }

  // What a tape in the workspace has room for.
  static int64_t tape(const ProgramJob<T> &job, bool backward) {
    return TapeLayout{job.program, !keeps_tape(job.keep) && backward ? Keep::all : Keep::inputs}.rows();
  }
};

template <class T> int64_t tile_forward(const ProgramJob<T> &job) {
  int64_t size = 0;
  const Memory<T> memory(job, false, size);
  Program<T> program(job);
  program.pack(memory.packed);
  program.pack_masked(memory.masked);
  if (const int64_t unordered = program.order(reinterpret_cast<int32_t *>(memory.orders)); unordered >= 0)
    return unordered;
  struct Data {
    const ProgramJob<T> &job;
    const Memory<T> &memory;
    const Program<T> &program;
  } data{job, memory, program};
  job.parallel(
      memory.pieces,
      [](int64_t begin, int64_t end, void *pointer) {
        const Data &d = *static_cast<const Data *>(pointer);
        const int64_t tiles = tile_count(d.job.batch);
        for (int64_t piece = begin; piece < end; ++piece) {
          const Workspace<T> w = d.memory.of_piece(d.job, piece, false);
          for (int64_t tile = piece * tiles / d.memory.pieces; tile < (piece + 1) * tiles / d.memory.pieces; ++tile)
            d.program.forward(tile, w, keeps_tape(d.job.keep) ? d.job.keep : Keep::inputs);
        }
      },
      &data);
  return -1;
}

template <class T> int64_t tile_backward(const ProgramBackwardJob<T> &whole) {
  const ProgramJob<T> &job = whole.forward;
  int64_t size = 0;
  const Memory<T> memory(job, true, size);
  Program<T> program(job);
  program.wants(whole.grads);
  program.pack(memory.packed);
  program.pack_masked(memory.masked);
  if (const int64_t unordered = program.order(reinterpret_cast<int32_t *>(memory.orders)); unordered >= 0)
    return unordered;
  struct Data {
    const ProgramBackwardJob<T> &whole;
    const Memory<T> &memory;
    const Program<T> &program;
  } data{whole, memory, program};
  job.parallel(
      memory.pieces,
      [](int64_t begin, int64_t end, void *pointer) {
        const Data &d = *static_cast<const Data *>(pointer);
        const ProgramJob<T> &job = d.whole.forward;
        const int64_t tiles = tile_count(job.batch);
        for (int64_t piece = begin; piece < end; ++piece) {
          const Workspace<T> w = d.memory.of_piece(job, piece, true);
          const int64_t first = piece * tiles / d.memory.pieces;
          for (int64_t tile = first; tile < (piece + 1) * tiles / d.memory.pieces; ++tile)
            d.program.backward(d.whole, tile, w, d.memory.accumulators + piece * d.memory.stride, tile > first);
        }
      },
      &data);
  if (job.program.shared) { // several layers add to one gradient
    for (int64_t l = 0; l < job.program.layer_count; ++l)
      program.reduce(whole, l, memory.accumulators, memory.stride, memory.pieces, true);
    return -1;
  }
  job.parallel(
      job.program.layer_count,
      [](int64_t begin, int64_t end, void *pointer) {
        const Data &d = *static_cast<const Data *>(pointer);
        for (int64_t l = begin; l < end; ++l)
          d.program.reduce(d.whole, l, d.memory.accumulators, d.memory.stride, d.memory.pieces, false);
      },
      &data);
  return -1;
}

} // namespace

// Rows that pass a wide walk together: what it needs beside its results does not grow with the batch.
constexpr int64_t slice_rows = 1 << 10;

// f(first row, rows) for each slice of a batch; else for all of it.
template <class F> void each_slice(int64_t batch, bool wide, const F &f) {
  const int64_t most = wide ? slice_rows : larger(batch, 1);
  for (int64_t first = 0; first < batch; first += most)
    f(first, smaller(most, batch - first));
}

template <class P> P *part(P *data, int64_t offset) { return data == nullptr ? nullptr : data + offset; }

template <class T> int64_t saved_size(const ProgramView &program, int64_t batch, bool wide, Keep keep) {
  if (keep == Keep::output)
    return batch * program.dim;
  if (!keeps_tape(keep))
    return 0;
  int64_t size = 0;
  each_slice(batch, wide, [&](int64_t, int64_t rows) {
    size += tile_count(rows) * TapeLayout{program, wide ? Keep::inputs : keep}.rows() * leading<T>(rows);
    size += wide && keep == Keep::all ? saved_of_nets<T>(program, rows) : 0;
  });
  return size;
}

// A part of a wide walk. Whether a batch is walked so depends on all of its rows, and is not asked again.
template <class T> ProgramJob<T> slice_of(const ProgramJob<T> &job, int64_t first, int64_t rows) {
  ProgramJob<T> slice = job;
  const int64_t dim = job.program.dim;
  slice.batch = rows;
  slice.x = part(job.x, first * dim), slice.context = part(job.context, first * job.program.context);
  slice.y = part(job.y, first * dim), slice.logdet = part(job.logdet, first);
  slice.saved = part(job.saved, saved_size<T>(job.program, first, true, job.keep));
  return slice;
}

template <class T> bool program_is_wide(const ProgramView &program, int64_t batch, bool inverse) {
  if (program.net_weights == 0 || program.sequential[inverse])
    return false;
  const int64_t bytes = program.net_weights * static_cast<int64_t>(sizeof(T));
  return batch < wide_rows ||
         (program.panels ? bytes > panel_bytes : bytes > wide_bytes && widest_step<T>(program, batch) >= shared_step);
}

template <class T> int64_t program_saved_size(const ProgramView &program, int64_t batch, bool inverse, Keep keep) {
  return saved_size<T>(program, batch, program_is_wide<T>(program, batch, inverse), keep);
}

template <class T> int64_t program_ahead_size(const ProgramView &program, int64_t batch, bool inverse) {
  const bool wide = program_is_wide<T>(program, batch, inverse);
  return wide ? saved_size<T>(program, smaller(batch, slice_rows), true, Keep::all) : 0;
}

// In how many chunks of rows the batch passes, each through the whole program in one thread, where backward is not to
// come. 0: threads share each step. Weights that leave the caches are read again for each chunk, so those are larger.
template <class T> int64_t chunk_count(const ProgramJob<T> &job, bool backward) {
  const bool cached = job.program.net_gradients * static_cast<int64_t>(sizeof(T)) <= cached_gradients;
  const int64_t fewest_rows = cached ? 64 : 128;
  const int64_t chunks = larger(ceil_div(job.batch, chunk_rows), smaller(job.batch / fewest_rows, job.threads));
  return !backward && job.keep == Keep::nothing && chunks >= job.threads ? chunks : 0;
}

template <class T> int64_t program_sharing(const ProgramJob<T> &job, bool backward) {
  const double step = widest_step<T>(job.program, job.batch);
  const bool wide = program_is_wide<T>(job.program, job.batch, job.inverse);
  if (!wide || step < shared_step || chunk_count(job, backward) > 0)
    return 1;
  return smaller(job.threads, larger(2, static_cast<int64_t>(step / shared_step * 4)));
}

template <class T> int64_t program_workspace(const ProgramJob<T> &job, bool backward) {
  int64_t size = 0;
  if (!program_is_wide<T>(job.program, job.batch, job.inverse)) {
    Memory<T>(job, backward, size);
    return size;
  }
  const int64_t chunks = chunk_count(job, backward);
  each_slice(chunks > 0 ? ceil_div(job.batch, chunks) : job.batch, true, [&](int64_t first, int64_t rows) {
    ProgramJob<T> slice = slice_of(job, first, rows);
    slice.threads = chunks > 0 ? 1 : job.threads, slice.workspace = nullptr;
    Program<T> program(slice);
    size = larger(size, WideWalk<T>(slice, program, backward).size());
    if (backward && job.y != nullptr)
      size = larger(size, WideWalk<T>(slice, program, false).size());
  });
  return (chunks > 0 ? job.threads : 1) * size;
}

template <class T> int64_t program_forward(const ProgramJob<T> &job) {
  if (!program_is_wide<T>(job.program, job.batch, job.inverse))
    return tile_forward(job);
  const auto walk = [&](int64_t first, int64_t rows, int64_t threads, T *workspace) {
    ProgramJob<T> slice = slice_of(job, first, rows);
    slice.threads = threads, slice.workspace = workspace;
    Program<T> program(slice);
    WideWalk<T>(slice, program, false).forward();
  };
  if (const int64_t chunks = chunk_count(job, false); chunks > 0) {
    const int64_t pieces = job.threads, size = program_workspace<T>(job, false) / pieces;
    run(Team{pieces, job.parallel}, pieces, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece)
        for (int64_t chunk = piece * chunks / pieces; chunk < (piece + 1) * chunks / pieces; ++chunk) {
          const int64_t first = chunk * job.batch / chunks;
          walk(first, (chunk + 1) * job.batch / chunks - first, 1, job.workspace + piece * size);
        }
    });
  } else {
    each_slice(job.batch, true, [&](int64_t first, int64_t rows) { walk(first, rows, job.threads, job.workspace); });
  }
  return -1;
}

template <class T> int64_t program_backward(const ProgramBackwardJob<T> &job) {
  const ProgramJob<T> &whole = job.forward;
  if (!program_is_wide<T>(whole.program, whole.batch, whole.inverse))
    return tile_backward(job);
  each_slice(whole.batch, true, [&](int64_t first, int64_t rows) {
    ProgramBackwardJob<T> slice = job;
    slice.forward = slice_of(whole, first, rows);
    slice.grad_y = part(job.grad_y, first * whole.program.dim);
    slice.grad_logdet += first, slice.grad_x += first * whole.program.dim;
    slice.grad_context = part(job.grad_context, first * whole.program.context);
    Program<T> program(slice.forward);
    if (whole.y != nullptr) {
      slice.forward.saved = whole.saved; // one slice's, for each in turn
      WideWalk<T>(slice.forward, program, false).forward();
    }
    WideWalk<T>(slice.forward, program, true).backward(slice, first > 0);
  });
  return -1;
}

#define IIN_FAST_INSTANTIATE(T)                                                                                        \
  template bool program_is_wide<T>(const ProgramView &, int64_t, bool);                                                \
  template int64_t program_sharing<T>(const ProgramJob<T> &, bool);                                                    \
  template int64_t program_saved_size<T>(const ProgramView &, int64_t, bool, Keep);                                    \
  template int64_t program_ahead_size<T>(const ProgramView &, int64_t, bool);                                          \
  template int64_t program_workspace<T>(const ProgramJob<T> &, bool);                                                  \
  template int64_t program_forward<T>(const ProgramJob<T> &);                                                          \
  template int64_t program_backward<T>(const ProgramBackwardJob<T> &);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
