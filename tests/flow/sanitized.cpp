// Parses each line of the input as a flow program and walks it forward and back, on memory of exactly the size that it
// asks for, with two threads. Compiled with sanitizers by test_sanitized.py. Prints how many lines were refused and
// walked.
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "flow_program/flow_program_loops.h"
#include "flow_program/flow_program_plan.h"

using namespace iin_fast;
namespace loops = iin_fast::IIN_FAST_ISA;

namespace {

constexpr int64_t most = 1 << 20; // elements of anything: a legal program may be larger than this test's memory

struct Memory { // on a cache line, and not a byte more
  explicit Memory(int64_t elements)
      : data(static_cast<float *>(::operator new(elements * sizeof(float), std::align_val_t(64)))) {
    for (int64_t i = 0; i < elements; ++i)
      data[i] = 0.01f * static_cast<float>(i % 97 - 48);
  }
  ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  Memory(const Memory &) = delete;
  float *data;
};

bool walk(const Plan &plan, int64_t batch, bool inverse, Keep keep) {
  const ProgramView &p = plan.view;
  int64_t total =
      p.packed_size + p.layer_gradients + p.net_gradients + 64 * (p.net_rows + (p.layer_count + 1) * p.dim + p.context);
  for (const int64_t needed : plan.needed)
    total += needed > most ? most : needed;
  if (total > most || p.tensors > 100)
    return false;
  std::vector<std::vector<float>> parameters, grads;
  std::vector<const void *> data;
  std::vector<float *> gradients;
  for (const int64_t needed : plan.needed) {
    parameters.emplace_back(needed, 0.3f), grads.emplace_back(needed, 0.0f);
    data.push_back(parameters.back().data()), gradients.push_back(grads.back().data());
  }
  std::vector<std::vector<int64_t>> indices; // what op flow_program makes sure of: each of a tensor of its own
  for (const ParameterUse &use : plan.uses)
    if (use.kind == ParameterUse::index) {
      for (const ParameterUse &other : plan.uses)
        if (other.kind != ParameterUse::index && other.ref.tensor == use.ref.tensor)
          return false;
      indices.emplace_back(plan.needed[use.ref.tensor]);
      for (int64_t i = 0; i < static_cast<int64_t>(indices.back().size()); ++i)
        indices.back()[i] = (i - use.ref.offset % p.dim + p.dim) % p.dim;
      data[use.ref.tensor] = indices.back().data();
    }
  const std::vector<uint8_t> bool_mask(p.tensors);
  const Memory x(batch * p.dim), context(batch * p.context), y(batch * p.dim), logdet(batch);
  const Memory saved(loops::program_saved_size<float>(p, batch, inverse, keep));
  ProgramJob<float> job{};
  job.program = p, job.inverse = inverse, job.base = true, job.keep = keep, job.batch = batch;
  job.x = x.data, job.context = context.data, job.parameters = data.data(), job.bool_mask = bool_mask.data();
  if (keep == Keep::output && p.autoregressive)
    return false;
  job.y = y.data, job.logdet = logdet.data, job.saved = keep == Keep::nothing ? nullptr : saved.data, job.threads = 2;
  job.parallel = [](int64_t count, void (*body)(int64_t, int64_t, void *), void *pointer) {
    std::thread other(body, 0, count / 2, pointer);
    body(count / 2, count, pointer);
    other.join();
  };
  const Memory workspace(loops::program_workspace<float>(job, false));
  job.workspace = workspace.data;
  if (loops::program_forward<float>(job) >= 0)
    return false; // masks without an order
  const Memory grad_x(batch * p.dim), grad_context(batch * p.context);
  const auto backward = [&] {
    const Memory back(loops::program_workspace<float>(job, true));
    job.workspace = back.data;
    loops::program_backward<float>(
        {job, y.data, logdet.data, grad_x.data, p.context ? grad_context.data : nullptr, gradients.data()});
  };
  job.y = job.logdet = nullptr;
  backward();
  const int64_t ahead = loops::program_ahead_size<float>(p, batch, inverse);
  const Memory kept(ahead), again(batch * p.dim), logdets(batch);
  job.y = again.data, job.logdet = logdets.data;
  job.keep = ahead > 0 ? Keep::all : Keep::nothing, job.saved = ahead > 0 ? kept.data : nullptr;
  backward();
  return true;
}

} // namespace

int main() {
  int64_t refused = 0, walked = 0;
  for (std::string text; std::getline(std::cin, text);) {
    try {
      const std::shared_ptr<const Plan> plan = plan_of(text);
      for (const int64_t batch : {1, 40})
        for (const bool inverse : {false, true})
          for (const Keep keep : {Keep::nothing, Keep::inputs, Keep::all, Keep::output})
            walked += walk(*plan, batch, inverse, keep);
    } catch (const std::runtime_error &) {
      ++refused;
    }
  }
  std::cout << refused << " " << walked << "\n";
}
