// The flow on the CPU: all blocks in one walk.
//
// A stage is what one half of a coupling sees: rows [conditioning | context | transformed], so that the first layer of
// its nets reads conditioning and context as one run. Between stages a row passes, in one go, through the rest of the
// coupling, the swap or permutation and the ActNorm (advance, retreat). The walk exists in two shapes:
//
//   wide   halves one after the other, threads share every layer (conditioner.h). Weights stream from memory once a
//          call, whatever the batch: large batches pass each half in chunks of rows, while its weights stay in cache.
//   tall   threads split the rows and each walks all blocks alone; for small nets, whose layers are too short to share.
//          In backward each thread then sums weight gradients of its own, added in a fixed order at the end.
//
// Bytes, forward: weights once; per row and half the stage (cached). Backward: weights twice, weight gradients once.
// Tuned on 2 Zen 5 cores at dim 64, hidden 512, depth 2 and at dim 8, hidden 64: docs/performance.md.
#include "flow/flow_loops.h"

#include <cmath>

#include "affine_coupling/affine_coupling.h"
#include "common/affine.h"
#include "common/math.h"
#include "common/sum.h"
#include "flow/conditioner.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// Rows that pass a half together: their activations stay in the second cache of a core.
constexpr int64_t chunk_rows = 256;

// Hands out pieces of the workspace, each on a cache line. With base null it only counts.
template <class T> struct Pieces {
  T *base;
  int64_t used = 0;
  T *take(int64_t count) {
    T *piece = base == nullptr ? nullptr : base + used;
    used += ceil_div(count, 16) * 16;
    return piece;
  }
};

// What is kept of one half for backward: its stage, and with Keep::all s and the activations.
template <class T> struct Saved {
  T *stage, *s, *activations;
};

template <class T> int64_t saved_half(const Widths<T> &w, int64_t batch, Keep keep) {
  return batch * (w.ld_row + (keep == Keep::all ? w.ld_out + 2 * (w.depth + 1) * w.ld_hidden : 0));
}

template <class T> Saved<T> saved_of(const FlowJob<T> &job, const Widths<T> &w, int64_t step) {
  const int64_t batch = job.sizes.batch;
  T *base = job.saved + step * saved_half(w, batch, job.keep);
  return {base, base + batch * w.ld_row, base + batch * (w.ld_row + w.ld_out)};
}

// ActNorm, activation, permutation, swap and coupling of single rows.
template <class T> struct Rows {
  const FlowJob<T> &job;
  Widths<T> w;
  double log_slope; // what the log-det gains per feature that the activation scaled

  explicit Rows(const FlowJob<T> &j)
      : job(j), w(j.sizes), log_slope(j.exact_logdet ? std::log(double(j.activation_slope)) : 0) {}

  const T *context(int64_t block, int64_t row) const {
    if (w.context == 0)
      return nullptr;
    return job.context + ((job.sizes.context_count > 1 ? block * job.sizes.batch : 0) + row) * w.context;
  }

  // z [dim] -> stage
  void put(int64_t block, int64_t row, const T *z, T *stage) const {
    const T *extra = context(block, row);
    for (int64_t j = 0; j < w.conditioning; ++j)
      stage[j] = z[j];
    for (int64_t j = 0; j < w.context; ++j)
      stage[w.conditioning + j] = extra[j];
    for (int64_t j = 0; j < w.transformed; ++j)
      stage[w.in + j] = z[w.conditioning + j];
    for (int64_t j = w.row; j < w.ld_row; ++j)
      stage[j] = T(0);
  }

  // stage -> z [dim]
  void get(const T *stage, T *z) const {
    for (int64_t j = 0; j < w.conditioning; ++j)
      z[j] = stage[j];
    for (int64_t j = 0; j < w.transformed; ++j)
      z[w.conditioning + j] = stage[w.in + j];
  }

  // (z[c:], z[:c]), the order of half 1
  void swap(const T *z, T *out) const {
    for (int64_t j = 0; j < w.transformed; ++j)
      out[j] = z[w.conditioning + j];
    for (int64_t j = 0; j < w.conditioning; ++j)
      out[w.transformed + j] = z[j];
  }

  void unswap(const T *z, T *out) const {
    for (int64_t j = 0; j < w.conditioning; ++j)
      out[j] = z[w.transformed + j];
    for (int64_t j = 0; j < w.transformed; ++j)
      out[w.conditioning + j] = z[j];
  }

  // out[j] = z[permutation[j]]
  void permute(int64_t block, const T *z, T *out) const {
    const int64_t *p = job.permutation + block * w.dim;
    for (int64_t j = 0; j < w.dim; ++j)
      out[j] = z[p[j]];
  }

  void unpermute(int64_t block, const T *y, T *z) const {
    const int64_t *p = job.permutation + block * w.dim;
    for (int64_t j = 0; j < w.dim; ++j)
      z[p[j]] = y[j];
  }

  // h = activation(scale * (x + loc)); returns what the activation adds to the log-det
  double normalize(int64_t block, const T *x, T *h) const {
    const T *loc = job.weights.loc + block * w.dim, *scale = job.weights.scale + block * w.dim;
    T negatives = 0;
    const T slope = job.activation_slope;
#pragma omp simd reduction(+ : negatives)
    for (int64_t j = 0; j < w.dim; ++j) {
      const T v = affine<true, false>(x[j], loc[j], scale[j]);
      h[j] = leaky(v, slope);
      negatives += v < T(0) ? T(1) : T(0);
    }
    return slope == T(1) ? 0 : negatives * log_slope;
  }

  double denormalize(int64_t block, const T *h, T *x) const {
    const T *loc = job.weights.loc + block * w.dim, *scale = job.weights.scale + block * w.dim;
    T negatives = 0;
    const T slope = job.activation_slope;
#pragma omp simd reduction(+ : negatives)
    for (int64_t j = 0; j < w.dim; ++j) {
      x[j] = affine<true, true>(leaky_inverse(h[j], slope), loc[j], scale[j]);
      negatives += h[j] < T(0) ? T(1) : T(0);
    }
    return slope == T(1) ? 0 : negatives * log_slope;
  }

  // Back through normalize, from the gradient of h to that of x, or through denormalize (inverse), the other way; adds
  // to the gradients of loc and scale.
  template <bool inverse>
  void normalize_backward(int64_t block, const T *h, const T *grad, T grad_logdet, T *to, T *grad_loc,
                          T *grad_scale) const {
    const T *scale = job.weights.scale + block * w.dim;
    const T slope = job.activation_slope, sign = inverse ? T(-1) : T(1);
#pragma omp simd
    for (int64_t j = 0; j < w.dim; ++j) {
      const T scaled = leaky_inverse(h[j], slope) / scale[j];
      const T through = !inverse && h[j] < T(0) ? grad[j] * slope : grad[j];
      const AffineGradient<T> e = affine_backward<true, inverse>(scaled, scale[j], through);
      to[j] = inverse && h[j] < T(0) ? e.x / slope : e.x;
      grad_loc[j] += e.shift, grad_scale[j] += e.scale + sign * grad_logdet / scale[j];
    }
  }

  // The transformed part v of a stage, forward or back; s = tanh(raw), which is added to `sum`.
  template <bool inverse> void couple_row(T *v, const T *raw, const T *shift, T *s, CompensatedSum<double> &sum) const {
    add_terms<T>(sum, w.transformed, [&](int64_t j) __attribute__((always_inline)) {
      T logdet;
      v[j] = iin_fast::couple<Squash::tanh, inverse>(v[j], raw[j], shift[j], T(1), logdet);
      return s[j] = inverse ? -logdet : logdet;
    });
  }
  void couple(T *v, const T *raw, const T *shift, T *s, bool inverse, CompensatedSum<double> &sum) const {
    inverse ? couple_row<true>(v, raw, shift, s, sum) : couple_row<false>(v, raw, shift, s, sum);
  }

  // Gradients of raw, of the shift, and of the transformed part, g in place. v: as the forward map saw it.
  template <bool inverse>
  void couple_row_backward(const T *v, const T *s, T grad_logdet, T *g, T *d_raw, T *d_shift) const {
#pragma omp simd
    for (int64_t j = 0; j < w.transformed; ++j) {
      const CouplingGradient<T> e = couple_by_backward<inverse>(s[j], T(1) - s[j] * s[j], v[j], g[j], grad_logdet);
      g[j] = e.x, d_raw[j] = e.raw, d_shift[j] = e.shift;
    }
  }
};

template <class T> double actnorm_logdet(const FlowJob<T> &job) {
  CompensatedSum<double> sum;
  for (int64_t i = 0; i < job.sizes.n_flows * job.sizes.dim; ++i)
    sum.add(std::log(std::fabs(double(job.weights.scale[i]))));
  return sum.total();
}

// How threads share a call.
struct Plan {
  int64_t threads;
  bool tall;
};

// A parallel step costs a few microseconds to start (and far more on a machine that is busy with something else), so a
// step that is worth less than `step` on one core is not shared. Costs are what one AVX-512 core takes for the widest
// layer of both nets, bound by arithmetic or by reading the weights, in nanoseconds.
template <class T> Plan plan_of(const FlowSizes &s, int64_t threads) {
  constexpr double step = 10e3, flops = 200, bytes = 30; // the latter two per nanosecond
  const Widths<T> w(s);
  const double widest = 2.0 * w.hidden * larger(w.depth > 0 ? w.hidden : 0, larger(w.in, w.transformed));
  const double layer = widest * (2.0 * s.batch / flops > sizeof(T) / bytes ? 2.0 * s.batch / flops : sizeof(T) / bytes);
  const double walk = layer * w.layers * 2 * s.n_flows;
  const double net = double(w.in + w.transformed + w.depth * w.hidden) * w.hidden * sizeof(T);
  if (threads == 1)
    return {1, true};
  if (net <= 128 * 1024 || layer < step) {
    const int64_t useful = smaller(threads, smaller(s.batch / 8, static_cast<int64_t>(walk / (2 * step))));
    if (useful > 1 && net <= 512 * 1024)
      return {useful, true};
  }
  return layer < step ? Plan{1, true}
                      : Plan{smaller(threads, larger(2, static_cast<int64_t>(layer / step * 4))), false};
}

// Calls f(begin, end, group) on row groups of [from, to), on the team's threads.
template <class F> void over_rows(const Team &team, int64_t from, int64_t to, int64_t dim, const F &f) {
  const int64_t rows = to - from;
  const int64_t groups = larger(1, smaller(team.threads, rows * dim / 512)); // below, a second thread gains nothing
  team.run(groups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      f(from + g * rows / groups, from + (g + 1) * rows / groups, g);
  });
}

template <class T> struct ForwardSpace {
  T *stage, *activations, *raw, *row; // row: 3 rows per thread of the team
  CompensatedSum<double> *logdets;    // of the map from the rows' x to their y, or of its inverse
  ForwardSpace(Pieces<T> &pieces, const Widths<T> &w, int64_t batch, int64_t threads, Keep keep) {
    const int64_t chunk = smaller(batch, chunk_rows);
    stage = keep != Keep::nothing ? nullptr : pieces.take(batch * w.ld_row);
    activations = keep == Keep::all ? nullptr : pieces.take(2 * 2 * chunk * w.ld_hidden);
    raw = pieces.take(2 * chunk * w.ld_out);
    row = pieces.take(threads * 3 * w.ld_dim);
    logdets = reinterpret_cast<CompensatedSum<double> *>(
        pieces.take(batch * static_cast<int64_t>(sizeof(CompensatedSum<double>) / sizeof(T))));
  }
};

// Rows [from, to) through all blocks. space.stage and logdets are indexed from `from`.
template <class T>
void walk_forward(const FlowJob<T> &job, const Rows<T> &rows, const Team &team, const ForwardSpace<T> &space,
                  int64_t from, int64_t to, double constant) {
  const Widths<T> &w = rows.w;
  const int64_t batch = job.sizes.batch, n = job.sizes.n_flows, steps = 2 * n;
  // the stage of a step (block, half) = step / 2, step % 2, at row r
  const auto stage_of = [&](int64_t step, int64_t r) {
    return job.keep != Keep::nothing ? saved_of(job, w, step).stage + r * w.ld_row
                                     : space.stage + (r - from) * w.ld_row;
  };
  over_rows(team, from, to, w.dim, [&](int64_t begin, int64_t end, int64_t group) {
    T *z = space.row + group * 3 * w.ld_dim;
    for (int64_t r = begin; r < end; ++r) {
      CompensatedSum<double> &logdet = space.logdets[r - from] = {};
      logdet.add(constant);
      if (job.inverse) {
        rows.unpermute(n - 1, job.x + r * w.dim, z);
        rows.put(n - 1, r, z, stage_of(steps - 1, r));
      } else {
        logdet.add(rows.normalize(0, job.x + r * w.dim, z));
        rows.put(0, r, z, stage_of(0, r));
      }
    }
  });
  for (int64_t walked = 0; walked < steps; ++walked) {
    const int64_t step = job.inverse ? steps - 1 - walked : walked, block = step / 2;
    for (int64_t chunk = from; chunk < to; chunk += chunk_rows) {
      const int64_t count = smaller(chunk_rows, to - chunk);
      const T *u = stage_of(step, chunk);
      Activations<T> activations{space.activations, 2 * chunk_rows * w.ld_hidden, chunk_rows * w.ld_hidden, false};
      if (job.keep == Keep::all)
        activations = {saved_of(job, w, step).activations + chunk * w.ld_hidden, (w.depth + 1) * batch * w.ld_hidden,
                       batch * w.ld_hidden, true};
      else if (to - from < chunk_rows)
        activations.net_stride = 2 * (to - from) * w.ld_hidden, activations.layer_stride = (to - from) * w.ld_hidden;
      const int64_t raw_stride = smaller(chunk_rows, to - from) * w.ld_out;
      conditioner_forward(team, job.weights, w, step * 2, u, activations, space.raw, raw_stride, count,
                          job.leaky_slope);
      over_rows(team, chunk, chunk + count, w.dim, [&](int64_t begin, int64_t end, int64_t group) {
        T *z = space.row + group * 3 * w.ld_dim, *next = z + w.ld_dim, *work = next + w.ld_dim;
        for (int64_t r = begin; r < end; ++r) {
          T *raw = space.raw + (r - chunk) * w.ld_out;
          const T *shift = raw + raw_stride;
          T *s = job.keep == Keep::all ? saved_of(job, w, step).s + r * w.ld_out : raw;
          T *stage = stage_of(step, r);
          rows.get(stage, z);
          CompensatedSum<double> &logdet = space.logdets[r - from];
          rows.couple(z + w.conditioning, raw, shift, s, job.inverse, logdet);
          for (int64_t j = w.transformed; j < w.ld_out; ++j)
            s[j] = T(0);
          if (!job.inverse) {
            if (step % 2 == 0) {
              rows.swap(z, next);
              rows.put(block, r, next, stage_of(step + 1, r));
            } else if (block == n - 1) {
              rows.permute(block, z, job.y + r * w.dim);
            } else {
              rows.permute(block, z, next);
              logdet.add(rows.normalize(block + 1, next, work));
              rows.put(block + 1, r, work, stage_of(step + 1, r));
            }
          } else {
            if (job.keep != Keep::nothing)
              rows.put(block, r, z, stage); // backward wants what the forward map would have seen
            if (step % 2 == 1) {
              rows.unswap(z, next);
              rows.put(block, r, next, stage_of(step - 1, r));
            } else {
              T *x = block == 0 ? job.y + r * w.dim : next;
              logdet.add(rows.denormalize(block, z, x));
              if (block > 0) {
                rows.unpermute(block - 1, x, work);
                rows.put(block - 1, r, work, stage_of(step - 1, r));
              }
            }
          }
          if (walked == steps - 1)
            job.logdet[r] = static_cast<T>(job.inverse ? -logdet.total() : logdet.total());
        }
      });
    }
  }
}

// Backward. `g` is the gradient of a row, in the order of the stage: conditioning, then transformed.

template <class T> struct BackwardSpace {
  T *stage, *gradient, *activations, *raw, *d, *other, *row, *actnorm;
  int64_t actnorm_stride; // loc and scale gradients of all blocks, one copy per thread of the team
  BackwardSpace(Pieces<T> &pieces, const FlowSizes &s, const Widths<T> &w, int64_t batch, int64_t threads, Keep keep) {
    const int64_t chunk = smaller(batch, chunk_rows);
    stage = keep != Keep::nothing ? nullptr : pieces.take(batch * w.ld_row);
    activations = keep == Keep::all ? nullptr : pieces.take(2 * (w.depth + 1) * chunk * w.ld_hidden);
    raw = keep == Keep::all ? nullptr : pieces.take(2 * chunk * w.ld_out);
    gradient = pieces.take(batch * w.ld_dim);
    d = pieces.take(2 * chunk * w.ld_wide);
    other = pieces.take(2 * chunk * w.ld_wide);
    row = pieces.take(threads * 3 * w.ld_dim);
    actnorm_stride = s.n_flows * 2 * w.ld_dim;
    actnorm = pieces.take(threads * actnorm_stride);
  }
};

// Rows [from, to) back through all blocks, in the direction against that of the map.
template <class T> class BackwardWalk {
public:
  BackwardWalk(const FlowBackwardJob<T> &whole, const Rows<T> &rows, const Team &team, const BackwardSpace<T> &space,
               const FlowWeights<T> &grads, int64_t from, int64_t to)
      : whole_(whole), job_(whole.forward), rows_(rows), w_(rows.w), team_(team), space_(space), grads_(grads),
        from_(from), to_(to), steps_(2 * job_.sizes.n_flows), saved_(job_.keep != Keep::nothing),
        all_(job_.keep == Keep::all) {}

  void run() const {
    for (int64_t i = 0; i < team_.threads * space_.actnorm_stride; ++i)
      space_.actnorm[i] = T(0);
    enter();
    for (int64_t walked = 0; walked < steps_; ++walked)
      for (int64_t chunk = from_; chunk < to_; chunk += chunk_rows)
        half(job_.inverse ? walked : steps_ - 1 - walked, chunk, smaller(chunk_rows, to_ - chunk));
  }

private:
  // A row's pieces of the workspace.
  struct Row {
    T *z, *next, *work;
  };
  Row row_of(int64_t group) const {
    T *const z = space_.row + group * 3 * w_.ld_dim;
    return {z, z + w_.ld_dim, z + 2 * w_.ld_dim};
  }
  T *stage_of(int64_t step, int64_t r) const {
    return saved_ ? saved_of(job_, w_, step).stage + r * w_.ld_row : space_.stage + (r - from_) * w_.ld_row;
  }
  T *gradient_of(int64_t r) const { return space_.gradient + (r - from_) * w_.ld_dim; }
  T *grad_loc(int64_t block, int64_t group) const {
    return space_.actnorm + group * space_.actnorm_stride + block * 2 * w_.ld_dim;
  }
  T *grad_scale(int64_t block, int64_t group) const { return grad_loc(block, group) + w_.ld_dim; }

  // Into the block of the first half.
  void enter() const {
    const int64_t last = job_.sizes.n_flows - 1;
    over_rows(team_, from_, to_, w_.dim, [&](int64_t begin, int64_t end, int64_t group) {
      T *const z = row_of(group).z;
      for (int64_t r = begin; r < end; ++r) {
        const T *gy = whole_.grad_y + r * w_.dim, *y = job_.y + r * w_.dim;
        if (job_.inverse) {
          enter_inverse(0, r, group, gy, y, z);
          continue;
        }
        rows_.unpermute(last, gy, gradient_of(r));
        if (!saved_) {
          rows_.unpermute(last, y, z);
          rows_.put(last, r, z, stage_of(steps_ - 1, r));
        }
      }
    });
  }

  // Into a block of the inverse map's backward: gx and x belong to what that block put out.
  void enter_inverse(int64_t block, int64_t r, int64_t group, const T *gx, const T *x, T *h) const {
    T *const stage = stage_of(2 * block, r);
    if (saved_) {
      rows_.get(stage, h);
    } else {
      rows_.normalize(block, x, h);
      rows_.put(block, r, h, stage);
    }
    rows_.template normalize_backward<true>(block, h, gx, whole_.grad_logdet[r], gradient_of(r), grad_loc(block, group),
                                            grad_scale(block, group));
  }

  // One half of a coupling, for rows [chunk, chunk + count).
  void half(int64_t step, int64_t chunk, int64_t count) const {
    const int64_t most = smaller(chunk_rows, to_ - from_), batch = job_.sizes.batch;
    const int64_t raw_stride = most * w_.ld_out, d_stride = most * w_.ld_wide;
    const T *const u = stage_of(step, chunk);
    Activations<T> activations{space_.activations, (w_.depth + 1) * most * w_.ld_hidden, most * w_.ld_hidden, true};
    if (all_)
      activations = {saved_of(job_, w_, step).activations + chunk * w_.ld_hidden, (w_.depth + 1) * batch * w_.ld_hidden,
                     batch * w_.ld_hidden, true};
    else
      conditioner_forward(team_, job_.weights, w_, step * 2, u, activations, space_.raw, raw_stride, count,
                          job_.leaky_slope);
    over_rows(team_, chunk, chunk + count, w_.dim, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t r = begin; r < end; ++r)
        couple_backward(step, r, r - chunk, raw_stride, d_stride);
    });
    const T *const d_u = conditioner_backward(team_, job_.weights, grads_, chunk > from_, w_, step * 2, u, activations,
                                              space_.d, space_.other, d_stride, count, job_.leaky_slope);
    over_rows(team_, chunk, chunk + count, w_.dim, [&](int64_t begin, int64_t end, int64_t group) {
      for (int64_t r = begin; r < end; ++r) {
        add_conditioning(step / 2, r, d_u + (r - chunk) * w_.ld_in, d_stride);
        job_.inverse ? leave_inverse(step, r, group) : leave_forward(step, r, group);
      }
    });
  }

  // Through the coupling of row r, the chunk's row `at`: gradients of raw and shift, and of the transformed part. Where
  // nothing was saved, the stage becomes what the map had before this half.
  void couple_backward(int64_t step, int64_t r, int64_t at, int64_t raw_stride, int64_t d_stride) const {
    T *const v = stage_of(step, r) + w_.in, *const g = gradient_of(r) + w_.conditioning;
    T *const d_raw = space_.d + at * w_.ld_out, *const d_shift = d_raw + d_stride;
    T *const s = all_ ? saved_of(job_, w_, step).s + r * w_.ld_out : space_.raw + at * w_.ld_out;
    const T *const shift = space_.raw + raw_stride + at * w_.ld_out;
    const T grad_logdet = whole_.grad_logdet[r];
    if (!saved_ && !job_.inverse) {
      CompensatedSum<double> not_wanted;
      rows_.couple(v, s, shift, s, true, not_wanted);
    } else if (!all_) {
      for (int64_t j = 0; j < w_.transformed; ++j)
        s[j] = math::tanh(s[j]);
    }
    if (!job_.inverse)
      return rows_.template couple_row_backward<false>(v, s, grad_logdet, g, d_raw, d_shift);
    rows_.template couple_row_backward<true>(v, s, grad_logdet, g, d_raw, d_shift);
    if (!saved_)
      for (int64_t j = 0; j < w_.transformed; ++j)
        v[j] = couple_by<false>(s[j], v[j], shift[j]);
  }

  // What both nets owe to their inputs.
  void add_conditioning(int64_t block, int64_t r, const T *d_s, int64_t d_stride) const {
    const T *const d_t = d_s + d_stride;
    T *const g = gradient_of(r);
    for (int64_t j = 0; j < w_.conditioning; ++j)
      g[j] += d_s[j] + d_t[j];
    if (whole_.grad_context == nullptr)
      return;
    const int64_t row = (job_.sizes.context_count > 1 ? block * job_.sizes.batch : 0) + r;
    T *const gc = whole_.grad_context + row * w_.context;
    for (int64_t j = 0; j < w_.context; ++j)
      gc[j] += d_s[w_.conditioning + j] + d_t[w_.conditioning + j];
  }

  // Between two halves: the gradient and, where nothing was saved, the row go through (un)swap to the stage of `to`.
  void turn(int64_t block, int64_t to, int64_t r, const Row &row, void (Rows<T>::*move)(const T *, T *) const) const {
    T *const g = gradient_of(r);
    (rows_.*move)(g, row.next);
    for (int64_t j = 0; j < w_.dim; ++j)
      g[j] = row.next[j];
    if (saved_)
      return;
    (rows_.*move)(row.z, row.next);
    rows_.put(block, r, row.next, stage_of(to, r));
  }

  // From a half of the inverse map on, towards the last block.
  void leave_inverse(int64_t step, int64_t r, int64_t group) const {
    const int64_t block = step / 2;
    const Row row = row_of(group);
    rows_.get(stage_of(step, r), row.z);
    if (step % 2 == 0)
      return turn(block, step + 1, r, row, &Rows<T>::swap);
    if (step == steps_ - 1)
      return rows_.permute(block, gradient_of(r), whole_.grad_x + r * w_.dim);
    rows_.permute(block, gradient_of(r), row.next);
    rows_.permute(block, row.z, row.work);
    enter_inverse(block + 1, r, group, row.next, row.work, row.z);
  }

  // From a half of the forward map on, towards the first block.
  void leave_forward(int64_t step, int64_t r, int64_t group) const {
    const int64_t block = step / 2;
    const Row row = row_of(group);
    rows_.get(stage_of(step, r), row.z);
    if (step % 2 == 1)
      return turn(block, step - 1, r, row, &Rows<T>::unswap);
    T *const g = gradient_of(r), *const gx = block == 0 ? whole_.grad_x + r * w_.dim : row.next;
    rows_.template normalize_backward<false>(block, row.z, g, whole_.grad_logdet[r], gx, grad_loc(block, group),
                                             grad_scale(block, group));
    if (block == 0)
      return;
    rows_.unpermute(block - 1, gx, g);
    if (saved_)
      return;
    rows_.denormalize(block, row.z, row.next);
    rows_.unpermute(block - 1, row.next, row.work);
    rows_.put(block - 1, r, row.work, stage_of(step - 1, r));
  }

  const FlowBackwardJob<T> &whole_;
  const FlowJob<T> &job_;
  const Rows<T> &rows_;
  const Widths<T> &w_;
  const Team &team_;
  const BackwardSpace<T> &space_;
  const FlowWeights<T> &grads_;
  int64_t from_, to_, steps_;
  bool saved_, all_;
};

// Elements of the conditioners' gradients, in the order of FlowWeights.
template <class T> struct GradientSizes {
  int64_t weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out;
  GradientSizes(const FlowSizes &s, const Widths<T> &w) {
    const int64_t nets = s.n_flows * 4;
    weight_in = nets * w.in * w.hidden, bias_in = nets * w.hidden;
    weight_hidden = nets * w.depth * w.hidden * w.hidden, bias_hidden = nets * w.depth * w.hidden;
    weight_out = nets * w.hidden * w.transformed, bias_out = nets * w.transformed;
  }
};

template <class T> FlowWeights<T> take_gradients(Pieces<T> &pieces, const FlowSizes &s, const Widths<T> &w) {
  const GradientSizes<T> size(s, w);
  FlowWeights<T> g{};
  g.weight_in = pieces.take(size.weight_in), g.bias_in = pieces.take(size.bias_in);
  g.weight_hidden = pieces.take(size.weight_hidden), g.bias_hidden = pieces.take(size.bias_hidden);
  g.weight_out = pieces.take(size.weight_out), g.bias_out = pieces.take(size.bias_out);
  return g;
}

// into[i] += sum over copies k = 1.. of copy 0's counterpart, `stride` apart
template <class T>
void add_copies(const Team &team, T *into, const T *first, int64_t stride, int64_t copies, int64_t n) {
  const int64_t piece = 4096;
  team.run(ceil_div(n, piece), [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < copies; ++k)
#pragma omp simd
      for (int64_t i = begin * piece; i < smaller(end * piece, n); ++i)
        into[i] += first[k * stride + i];
  });
}

template <class T> void add_actnorm(const FlowBackwardJob<T> &job, const BackwardSpace<T> &space, int64_t copies) {
  const Widths<T> w(job.forward.sizes);
  for (int64_t block = 0; block < job.forward.sizes.n_flows; ++block)
    for (int64_t copy = 0; copy < copies; ++copy) {
      const T *loc = space.actnorm + copy * space.actnorm_stride + block * 2 * w.ld_dim, *scale = loc + w.ld_dim;
      for (int64_t j = 0; j < w.dim; ++j) {
        job.grads.loc[block * w.dim + j] += loc[j];
        job.grads.scale[block * w.dim + j] += scale[j];
      }
    }
}

} // namespace

template <class T> int64_t flow_saved_size(const FlowSizes &s, Keep keep) {
  return keep == Keep::nothing ? 0 : 2 * s.n_flows * saved_half(Widths<T>(s), s.batch, keep);
}

template <class T> int64_t flow_sharing(const FlowSizes &s, int64_t threads) {
  const Plan plan = plan_of<T>(s, threads);
  return plan.tall ? 1 : plan.threads;
}

template <class T> int64_t flow_forward_workspace(const FlowSizes &s, int64_t threads, Keep keep) {
  Pieces<T> pieces{nullptr};
  const Widths<T> w(s);
  const Plan plan = plan_of<T>(s, threads);
  if (!plan.tall) {
    ForwardSpace<T>(pieces, w, s.batch, plan.threads, keep);
    return pieces.used;
  }
  ForwardSpace<T>(pieces, w, ceil_div(s.batch, plan.threads), 1, keep);
  return pieces.used * plan.threads;
}

template <class T> int64_t flow_backward_workspace(const FlowSizes &s, int64_t threads, Keep keep, bool weight_grads) {
  Pieces<T> pieces{nullptr};
  const Widths<T> w(s);
  const Plan plan = plan_of<T>(s, threads);
  if (!plan.tall) {
    BackwardSpace<T>(pieces, s, w, s.batch, plan.threads, keep);
    return pieces.used;
  }
  BackwardSpace<T>(pieces, s, w, ceil_div(s.batch, plan.threads), 1, keep);
  if (weight_grads && plan.threads > 1)
    take_gradients(pieces, s, w);
  return pieces.used * plan.threads;
}

template <class T> void flow_forward(const FlowJob<T> &job) {
  const Rows<T> rows(job);
  const Plan plan = plan_of<T>(job.sizes, job.threads);
  const int64_t batch = job.sizes.batch, threads = plan.threads;
  const double constant = actnorm_logdet(job);
  Pieces<T> pieces{job.workspace};
  if (!plan.tall) {
    const ForwardSpace<T> space(pieces, rows.w, batch, threads, job.keep);
    walk_forward(job, rows, Team{threads, job.parallel_for}, space, 0, batch, constant);
    return;
  }
  const int64_t part = flow_forward_workspace<T>(job.sizes, job.threads, job.keep) / threads;
  Team{threads, job.parallel_for}.run(threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Pieces<T> own{job.workspace + t * part};
      const ForwardSpace<T> space(own, rows.w, ceil_div(batch, threads), 1, job.keep);
      walk_forward(job, rows, Team{1, nullptr}, space, t * batch / threads, (t + 1) * batch / threads, constant);
    }
  });
}

template <class T> void flow_backward(const FlowBackwardJob<T> &job) {
  const FlowJob<T> &forward = job.forward;
  const Rows<T> rows(forward);
  const FlowSizes &s = forward.sizes;
  const Plan plan = plan_of<T>(s, forward.threads);
  const int64_t batch = s.batch, threads = plan.threads;
  const bool weight_grads = job.grads.weight_in != nullptr;
  const Team team{threads, forward.parallel_for};
  Pieces<T> pieces{forward.workspace};
  if (!plan.tall) {
    const BackwardSpace<T> space(pieces, s, rows.w, batch, threads, forward.keep);
    BackwardWalk<T>(job, rows, team, space, job.grads, 0, batch).run();
    add_actnorm(job, space, threads);
    return;
  }
  const int64_t part = flow_backward_workspace<T>(s, forward.threads, forward.keep, weight_grads) / threads;
  const auto space_of = [&](int64_t t, FlowWeights<T> *grads) {
    Pieces<T> own{forward.workspace + t * part};
    const BackwardSpace<T> space(own, s, rows.w, ceil_div(batch, threads), 1, forward.keep);
    *grads = t == 0 || !weight_grads ? job.grads : take_gradients(own, s, rows.w);
    return space;
  };
  team.run(threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      FlowWeights<T> grads;
      const BackwardSpace<T> space = space_of(t, &grads);
      const Team alone{1, nullptr};
      BackwardWalk<T>(job, rows, alone, space, grads, t * batch / threads, (t + 1) * batch / threads).run();
    }
  });
  for (int64_t t = 0; t < threads; ++t) {
    FlowWeights<T> grads;
    add_actnorm(job, space_of(t, &grads), 1);
  }
  if (!weight_grads || threads == 1)
    return;
  FlowWeights<T> first;
  space_of(1, &first);
  const GradientSizes<T> size(s, rows.w);
  const auto add = [&](T *into, const T *from, int64_t n) { add_copies(team, into, from, part, threads - 1, n); };
  add(job.grads.weight_in, first.weight_in, size.weight_in);
  add(job.grads.bias_in, first.bias_in, size.bias_in);
  add(job.grads.weight_hidden, first.weight_hidden, size.weight_hidden);
  add(job.grads.bias_hidden, first.bias_hidden, size.bias_hidden);
  add(job.grads.weight_out, first.weight_out, size.weight_out);
  add(job.grads.bias_out, first.bias_out, size.bias_out);
}

#define IIN_FAST_INSTANTIATE(T)                                                                                        \
  template int64_t flow_saved_size<T>(const FlowSizes &, Keep);                                                        \
  template int64_t flow_sharing<T>(const FlowSizes &, int64_t);                                                        \
  template int64_t flow_forward_workspace<T>(const FlowSizes &, int64_t, Keep);                                        \
  template int64_t flow_backward_workspace<T>(const FlowSizes &, int64_t, Keep, bool);                                 \
  template void flow_forward<T>(const FlowJob<T> &);                                                                   \
  template void flow_backward<T>(const FlowBackwardJob<T> &);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
