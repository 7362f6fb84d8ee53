// The CPU loops of the ops on several threads, compiled for ThreadSanitizer by test_sanitized_loops.py: rows shared as
// torch's pool shares them, and the steps of a flow by a team, as in flow_program_cpu.cpp. Reads flow programs, each a
// line with the rows of its batch in front.
//
// on_threads NAME OVERLAP: the op, and how many rows or parts each thread takes of its neighbour's. More than 0 is a
// race, which has to be found. Prints how many calls gave what one thread gives, how many did not, how many walks
// of a flow a team shared, and how many steps were shared without one; then of every call a sum of what one thread
// gave, weighted and of magnitudes, for test_aarch64.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "affine_coupling/affine_coupling_loops.h"
#include "common/thread_team.h"
#include "flow_program/flow_program_loops.h"
#include "flow_program/flow_program_plan.h"
#include "pair_nll/pair_nll_loops.h"
#include "spline_coupling/spline_coupling_loops.h"

using namespace iin_fast;
namespace loops = iin_fast::IIN_FAST_ISA;

namespace {

constexpr int64_t many = 3; // threads
int64_t overlap = 0, same = 0, different = 0, by_team = 0, by_rows = 0;
std::vector<double> sums;

template <class T> T number(double value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return {static_cast<uint16_t>(bits_of(static_cast<float>(value)) >> 16)};
  else if constexpr (std::is_same_v<T, Half>)
    return half_of(static_cast<float>(value));
  else
    return static_cast<T>(value);
}

double value(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
double value(Half x) { return float_of(x); }
double value(double x) { return x; }

template <class T> std::vector<T> numbers(int64_t count, double size) {
  std::mt19937 random(static_cast<uint32_t>(count));
  std::uniform_real_distribution<double> draw(-size, size);
  std::vector<T> drawn(count);
  for (T &x : drawn)
    x = number<T>(draw(random));
  return drawn;
}

using Outputs = std::vector<double>;

template <class T> void add(Outputs &outputs, const std::vector<T> &of) {
  for (const T x : of)
    outputs.push_back(value(x));
}

// Calls run(threads) for one thread and for many.
template <class Run> void compare(const Run &run) {
  const Outputs alone = run(1), shared = run(many);
  double error = 0, size = 0, sum = 0;
  for (size_t i = 0; i < alone.size(); ++i) {
    error += std::abs(alone[i] - shared[i]), size += std::abs(alone[i]);
    sum += static_cast<double>(i % 7 + 1) * alone[i];
  }
  sums.push_back(sum), sums.push_back(size);
  ++(error <= 1e-5 * size && size > 0 ? same : different);
}

template <class F> void on_threads(int64_t count, int64_t threads, const F &f) {
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t end = (t + 1) * count / threads + (threads > 1 ? overlap : 0);
    pool.emplace_back([&f, begin = t * count / threads, end = end < count ? end : count] { f(begin, end); });
  }
  for (std::thread &thread : pool)
    thread.join();
}

constexpr int64_t rows = 50, dim = 37;

template <class S> void affine(Squash squash, bool inverse) {
  using T = compute_t<S>;
  const auto x = numbers<S>(rows * dim, 2), raw = numbers<S>(rows * dim + 1, 2), shift = numbers<S>(rows * dim + 2, 2);
  const auto grad = numbers<T>(rows, 1);
  const S *const scaled = squash == Squash::none ? nullptr : raw.data();
  compare([&](int64_t threads) {
    std::vector<S> y(rows * dim), grad_x(rows * dim), grad_raw(rows * dim), grad_shift(rows * dim);
    std::vector<T> logdet(rows);
    const CouplingForward<S> forward{
        {x.data(), dim}, {scaled, dim}, {shift.data(), dim}, y.data(), logdet.data(), dim, 1.5, squash, inverse};
    const CouplingBackward<S> backward{{x.data(), dim},
                                       {scaled, dim},
                                       {shift.data(), dim},
                                       grad.data(),
                                       grad_x.data(),
                                       scaled ? grad_raw.data() : nullptr,
                                       grad_shift.data(),
                                       dim,
                                       1.5,
                                       squash,
                                       inverse};
    on_threads(rows, threads, [&](int64_t b, int64_t e) { loops::coupling_forward<S>(forward, b, e); });
    on_threads(rows, threads, [&](int64_t b, int64_t e) { loops::coupling_backward<S>(backward, b, e); });
    Outputs outputs;
    add(outputs, y), add(outputs, logdet), add(outputs, grad_x), add(outputs, grad_raw), add(outputs, grad_shift);
    return outputs;
  });
}

template <class S> void spline(Tails tails, Parameterization form, bool inverse) {
  using T = compute_t<S>;
  constexpr int64_t bins = 5;
  const int64_t count = 2 * bins + derivative_count(tails, bins);
  const auto x = numbers<S>(rows * dim, 2), raw = numbers<S>(rows * dim * count, 2);
  const auto grad = numbers<T>(rows, 1);
  SplineParameters<S> p{};
  p.values[0] = {raw.data(), raw.data() + raw.size(), dim * count, count, count};
  p.tensors = 1, p.bins = bins, p.count = count, p.tails = tails, p.form = form, p.inverse = inverse;
  p.limits = {-1.5, 1.5, -1.5, 1.5, 1e-3, 1e-3, 1e-3, form == Parameterization::zuko ? 1 / std::log(1e-3) : 0};
  compare([&](int64_t threads) {
    std::vector<S> y(rows * dim), grad_x(rows * dim), grad_raw(rows * dim * count);
    std::vector<T> logdet(rows);
    const SplineForward<S> forward{p, x.data(), y.data(), logdet.data(), dim};
    const SplineBackward<S> backward{
        p, x.data(), x.data(), grad.data(), grad_x.data(), {grad_raw.data(), nullptr, nullptr}, dim};
    on_threads(rows, threads, [&](int64_t b, int64_t e) {
      std::vector<T> scratch(scratch_size(p));
      loops::spline_forward<S>(forward, b, e, scratch.data());
      loops::spline_backward<S>(backward, b, e, scratch.data());
    });
    Outputs outputs;
    add(outputs, y), add(outputs, logdet), add(outputs, grad_x), add(outputs, grad_raw);
    return outputs;
  });
}

template <class S> void pair() {
  using T = compute_t<S>;
  const auto za = numbers<S>(rows * dim, 2), zb = numbers<S>(rows * dim + 1, 2);
  const auto logdet = numbers<T>(rows, 1);
  const int64_t sizes[] = {20, dim - 20};
  bool shared[2 * rows];
  for (int64_t i = 0; i < 2 * rows; ++i)
    shared[i] = i % 3 == 0;
  compare([&](int64_t threads) {
    std::vector<T> loss(rows);
    std::vector<S> grad_za(rows * dim), grad_zb(rows * dim);
    const PairNll<S> forward{za.data(), zb.data(), logdet.data(), logdet.data(), shared,     sizes,
                             2,         dim,       0.9,           true,          loss.data()};
    const PairNllBackward<S> backward{za.data(), zb.data(), shared, sizes,          logdet.data(),
                                      2,         dim,       0.9,    grad_za.data(), grad_zb.data()};
    on_threads(rows, threads, [&](int64_t b, int64_t e) {
      loops::pair_nll<S>(forward, b, e);
      loops::pair_nll_backward<S>(backward, b, e);
    });
    Outputs outputs;
    add(outputs, loss), add(outputs, grad_za), add(outputs, grad_zb);
    return outputs;
  });
}

thread_local ThreadTeam *leading = nullptr;

void parallel(int64_t count, void (*body)(int64_t, int64_t, void *), void *data) {
  if (leading == nullptr) {
    ++by_rows;
    return on_threads(count, many, [&](int64_t begin, int64_t end) { body(begin, end, data); });
  }
  struct Step {
    int64_t count;
    void (*body)(int64_t, int64_t, void *);
    void *data;
  } step{count, body, data};
  const auto taken = [](int64_t begin, int64_t end, void *pointer) {
    const Step &s = *static_cast<const Step *>(pointer);
    s.body(begin, end + overlap < s.count ? end + overlap : s.count, s.data);
  };
  leading->run(count, taken, &step);
}

template <class F> void with_team(int64_t threads, const F &walk) {
  if (threads <= 1)
    return walk();
  ++by_team;
  ThreadTeam team;
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back([&team] { team.work(); });
  team.start();
  leading = &team;
  walk();
  leading = nullptr;
  team.close();
  for (std::thread &other : others)
    other.join();
}

template <class T> void program(const Plan &plan, int64_t batch, Keep keep, bool inverse) {
  const ProgramView &p = plan.view;
  std::vector<std::vector<T>> parameters;
  std::vector<std::vector<int64_t>> indices(p.tensors);
  std::vector<const void *> data;
  for (const int64_t needed : plan.needed) {
    parameters.push_back(numbers<T>(needed, 0.15));
    data.push_back(parameters.back().data());
  }
  for (const ParameterUse &use : plan.uses)
    if (use.kind == ParameterUse::index) {
      std::vector<int64_t> &index = indices[use.ref.tensor];
      for (int64_t i = 0; i < plan.needed[use.ref.tensor]; ++i)
        index.push_back((i % p.dim + 1) % p.dim);
      data[use.ref.tensor] = index.data();
    }
  for (const ProgramLayer &l : plan.layers)
    for (int64_t i = 0; l.kind == LayerKind::affine && i < p.dim; ++i) // away from 0
      parameters[l.scale.tensor][l.scale.offset + i] += T(1);
  const std::vector<uint8_t> bool_mask(p.tensors);
  const auto x = numbers<T>(batch * p.dim, 1), grad_logdet = numbers<T>(batch, 1);
  const auto context = numbers<T>(batch * p.context, 1);
  compare([&](int64_t threads) {
    std::vector<T> y(x.size()), logdet(batch), grad_x(x.size()), grad_context(context.size());
    std::vector<T> saved(loops::program_saved_size<T>(p, batch, inverse, keep));
    std::vector<std::vector<T>> grads;
    std::vector<T *> pointers;
    for (const int64_t needed : plan.needed) {
      grads.emplace_back(needed);
      pointers.push_back(grads.back().data());
    }
    ProgramJob<T> job{};
    job.program = p, job.inverse = inverse, job.keep = keep, job.batch = batch, job.threads = threads;
    job.x = x.data(), job.context = context.data(), job.y = y.data(), job.logdet = logdet.data();
    job.parameters = data.data(), job.bool_mask = bool_mask.data(), job.saved = saved.data(), job.parallel = parallel;
    std::vector<T> forward(loops::program_workspace<T>(job, false) + 64);
    std::vector<T> backward(loops::program_workspace<T>(job, true) + 64);
    const auto aligned = [](T *p) { return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); };
    job.workspace = aligned(forward.data());
    with_team(loops::program_sharing<T>(job, false), [&] { loops::program_forward<T>(job); });
    job.workspace = aligned(backward.data());
    const ProgramBackwardJob<T> back{
        job, x.data(), grad_logdet.data(), grad_x.data(), p.context ? grad_context.data() : nullptr, pointers.data()};
    with_team(loops::program_sharing<T>(job, true), [&] { loops::program_backward<T>(back); });
    Outputs outputs;
    add(outputs, y), add(outputs, logdet), add(outputs, grad_x), add(outputs, grad_context);
    for (const std::vector<T> &grad : grads)
      add(outputs, grad);
    return outputs;
  });
}

template <class S> void small_op(const std::string &op) {
  for (const bool inverse : {false, true}) {
    for (int64_t code = 0; op == "affine_coupling" && code < squash_count; ++code)
      affine<S>(static_cast<Squash>(code), inverse);
    for (const Tails tails : {Tails::linear, Tails::none, Tails::circular})
      for (const Parameterization form : {Parameterization::nflows, Parameterization::zuko})
        if (op == "spline_coupling")
          spline<S>(tails, form, inverse);
  }
  if (op == "pair_nll")
    pair<S>();
}

} // namespace

int main(int, char **words) {
  const std::string op = words[1];
  overlap = std::atoll(words[2]);
  small_op<float>(op), small_op<double>(op), small_op<BFloat16>(op), small_op<Half>(op);
  int64_t batch;
  for (std::string text; op == "flow_program" && std::cin >> batch && std::getline(std::cin, text);)
    for (const bool inverse : {false, true})
      for (const Keep keep : {Keep::nothing, Keep::inputs, Keep::all, Keep::output}) {
        const std::shared_ptr<const Plan> plan = plan_of(text);
        program<float>(*plan, batch, keep, inverse), program<double>(*plan, batch, keep, inverse);
      }
  for (const int64_t count : {same, different, by_team, by_rows})
    std::printf("%lld ", static_cast<long long>(count));
  for (size_t i = 0; i < sums.size(); i += 2)
    std::printf("\n%.9g %.9g", sums[i], sums[i + 1]);
}
