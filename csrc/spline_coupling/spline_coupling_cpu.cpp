// spline_coupling on the CPU: tensor checks and the parallel loop. The loops are in spline_coupling_loops.cpp.
#include <numeric>

#include "spline_coupling/spline_coupling_checks.h"
#include "spline_coupling/spline_coupling_loops.h"

namespace iin_fast {
namespace {

template <class Storage>
SplineParameters<Storage> parameters_of(const SplineTensors &values, const SplineOptions &options, bool inverse) {
  SplineParameters<Storage> p{};
  p.tensors = static_cast<int>(values.size());
  p.bins = options.bins, p.count = options.count(), p.inverse = inverse, p.limits = options.limits();
  p.tails = static_cast<Tails>(options.tails), p.form = static_cast<Parameterization>(options.form);
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor &t = values[i];
    const Storage *const data = static_cast<const Storage *>(t.const_data_ptr());
    const int64_t last = (t.size(0) - 1) * t.stride(0) + (t.size(1) - 1) * t.stride(1);
    p.values[i] = {data, t.numel() == 0 ? data : data + last + t.size(2), t.stride(0), t.stride(1), t.size(2)};
  }
  return p;
}

// body(begin, end) on pieces of the rows of x, on torch's threads. Every piece begins where a block of elements does,
// so that a row is cut into the same blocks, and its log-det added up in the same way, whatever the number of threads.
template <class F> void over_rows(const Tensor &x, const F &body) {
  constexpr int64_t elements = 512; // worth a piece: about 20 microseconds at 8 bins
  constexpr int64_t block = 16;     // the most that the loops take at once
  const int64_t rows = x.size(0), features = x.size(1) > 0 ? x.size(1) : 1;
  const int64_t group = block / std::gcd(block, features), grain = elements / (features * group);
  torch::stable::parallel_for(0, (rows + group - 1) / group, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
    body(begin * group, end * group < rows ? end * group : rows);
  });
}

std::tuple<Tensor, Tensor>
spline_coupling(const Tensor &x_in,                          // [rows, features]
                const Tensor &parameters_in,                 // [rows, features, 2 bins + derivatives], or widths
                const std::optional<Tensor> &heights_in,     // [rows, features, bins]
                const std::optional<Tensor> &derivatives_in, // [rows, features, …]
                int64_t bins, int64_t tails, int64_t form, double left, double right, double bottom, double top,
                double min_width, double min_height, double min_derivative, bool inverse) {
  const SplineOptions options{bins, tails, form, left, right, bottom, top, min_width, min_height, min_derivative};
  const SplineTensors values_in = spline_tensors("spline_coupling", parameters_in, heights_in, derivatives_in);
  check_spline("spline_coupling", x_in, values_in, options);
  const Tensor x = torch::stable::contiguous(x_in);
  const SplineTensors values = with_contiguous_values(values_in);
  Tensor y = cpu_empty(x, x.sizes());
  Tensor logdet = cpu_empty(x, {x.size(0)}, accumulate_type(x.scalar_type()));
  with_storage("spline_coupling", x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const SplineForward<Storage> job{parameters_of<Storage>(values, options, inverse),
                                     static_cast<const Storage *>(x.const_data_ptr()),
                                     static_cast<Storage *>(y.mutable_data_ptr()),
                                     static_cast<compute_t<Storage> *>(logdet.mutable_data_ptr()), x.size(1)};
    const auto loop = IIN_FAST_LOOP(spline_forward<Storage>);
    over_rows(x, [&](int64_t begin, int64_t end) {
      std::vector<compute_t<Storage>> scratch(scratch_size(job.parameters));
      loop(job, begin, end, scratch.data());
    });
  });
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
spline_coupling_backward(const Tensor &grad_y_in,                 // [rows, features]
                         const Tensor &grad_logdet_in,            // [rows]
                         const Tensor &x_in,                      // [rows, features]: the input of the map
                         const Tensor &parameters_in,             // [rows, features, 2 bins + derivatives], or widths
                         const std::optional<Tensor> &heights_in, // [rows, features, bins]
                         const std::optional<Tensor> &derivatives_in, // [rows, features, …]
                         int64_t bins, int64_t tails, int64_t form, double left, double right, double bottom,
                         double top, double min_width, double min_height, double min_derivative, bool inverse) {
  const SplineOptions options{bins, tails, form, left, right, bottom, top, min_width, min_height, min_derivative};
  const char *op = "spline_coupling_backward";
  const SplineTensors values_in = spline_tensors(op, parameters_in, heights_in, derivatives_in);
  check_spline_backward(op, grad_y_in, grad_logdet_in, x_in, values_in, options);
  const Tensor x = torch::stable::contiguous(x_in);
  const SplineTensors values = with_contiguous_values(values_in);
  const Tensor grad_y = torch::stable::contiguous(grad_y_in), grad_logdet = torch::stable::contiguous(grad_logdet_in);
  Tensor grad_x = cpu_empty(x, x.sizes());
  SplineTensors grads = empty_gradients(values, [](const auto &like, auto sizes) { return cpu_empty(like, sizes); });
  with_storage(op, x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const auto written = [](Tensor &t) { return static_cast<Storage *>(t.mutable_data_ptr()); };
    const SplineBackward<Storage> job{parameters_of<Storage>(values, options, inverse),
                                      static_cast<const Storage *>(x.const_data_ptr()),
                                      static_cast<const Storage *>(grad_y.const_data_ptr()),
                                      static_cast<const compute_t<Storage> *>(grad_logdet.const_data_ptr()),
                                      written(grad_x),
                                      {written(grads[0]), written(grads[1]), written(grads[2])},
                                      x.size(1)};
    const auto loop = IIN_FAST_LOOP(spline_backward<Storage>);
    over_rows(x, [&](int64_t begin, int64_t end) {
      std::vector<compute_t<Storage>> scratch(scratch_size(job.parameters));
      loop(job, begin, end, scratch.data());
    });
  });
  return {grad_x, grads[0], grads[1], grads[2]};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("spline_coupling(Tensor x, Tensor parameters, Tensor? heights, Tensor? derivatives, int bins, int tails,"
        " int parameterization, float left,"
        " float right, float bottom, float top, float min_width, float min_height, float min_derivative, bool inverse)"
        " -> (Tensor, Tensor)");
  m.def("spline_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, Tensor? heights,"
        " Tensor? derivatives, int bins, int tails,"
        " int parameterization, float left, float right, float bottom, float top, float min_width, float min_height,"
        " float min_derivative, bool inverse) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) {
  m.impl("spline_coupling", TORCH_BOX(&spline_coupling));
  m.impl("spline_coupling_backward", TORCH_BOX(&spline_coupling_backward));
}

} // namespace iin_fast
