// flow_program on the CPU: tensor checks, memory, and torch's threads. The text is parsed in flow_program_plan.cpp, the
// walks are in flow_program_loops.cpp.
#include "common/sum.h"
#include "common/tensor.h"
#include "common/thread_team.h"
#include "common/workspace.h"
#include "flow_program/flow_program_checks.h"
#include "flow_program/flow_program_loops.h"

namespace iin_fast {
namespace {

using torch::stable::contiguous;
using torch::stable::new_zeros;

// The team that the calling thread leads, if any.
thread_local ThreadTeam *leading = nullptr;

void parallel(int64_t count, void (*body)(int64_t, int64_t, void *), void *data) {
  if (leading != nullptr)
    leading->run(count, body, data);
  else
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, data); });
}

// Calls walk() in this thread, with `threads` threads of torch's pool awake for its steps.
template <class F> void with_team(int64_t threads, const F &walk) {
  if (threads <= 1)
    return walk();
  ThreadTeam team;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0)
      return team.work();
    struct Lead {
      ThreadTeam &team;
      explicit Lead(ThreadTeam &t) : team(t) { team.start(), leading = &team; }
      ~Lead() { leading = nullptr, team.close(); }
    } lead(team);
    walk();
  });
}

// A wrong permutation would take the loops out of bounds.
void check_permutation(const int64_t *index, const ParameterUse &use) {
  std::vector<bool> seen(use.count);
  for (int64_t i = 0; i < use.count; ++i) {
    const int64_t from = index[i];
    STD_TORCH_CHECK(from >= 0 && from < use.count && !seen[from], "flow_program: layer ", use.layer,
                    ": its index is not a permutation of 0 .. ", use.count - 1);
    seen[from] = true;
  }
}

// What a walk found while it ran: masks may have changed since Python looked at them.
void check_order(int64_t unordered) {
  STD_TORCH_CHECK(unordered < 0, "flow_program: layer ", unordered,
                  ": its masks leave no order in which features can be found one after the other");
}

Inputs checked_on_cpu(const Plan &plan, const Tensor &x, const std::optional<Tensor> &context,
                      const std::vector<Tensor> &parameters) {
  Inputs in = checked(plan, x, context, parameters, [](const Tensor &t) { return t.is_cpu(); });
  for (const ParameterUse &use : plan.uses)
    if (use.kind == ParameterUse::index)
      check_permutation(static_cast<const int64_t *>(in.data[use.ref.tensor]) + use.ref.offset, use);
  return in;
}

template <class T> ProgramJob<T> job_of(const Plan &plan, const Inputs &in, bool inverse, bool base, int64_t keep) {
  ProgramJob<T> job{};
  job.program = plan.view;
  job.inverse = inverse, job.base = base, job.keep = static_cast<Keep>(keep);
  job.batch = in.x.size(0);
  job.x = static_cast<const T *>(in.x.const_data_ptr());
  job.context = in.context.has_value() ? static_cast<const T *>(in.context->const_data_ptr()) : nullptr;
  job.parameters = in.data.data(), job.bool_mask = in.bool_mask.data();
  job.threads = torch::stable::get_num_threads();
  job.parallel = parallel;
  return job;
}

// What forward keeps where the caller leaves it open: the most that fits this many bytes (docs/performance.md has the
// sizes that were tried). A wide walk keeps the inputs at least: it would have to find them again for all rows at once.
constexpr int64_t automatic = 3, automatic_bytes = 16 << 20, automatic_wide_bytes = 512 << 20;

void check_keep(const Plan &plan, int64_t keep) {
  STD_TORCH_CHECK(keep >= 0 && keep <= 4, "flow_program: keep must be 0, 1, 2, 3 or 4");
  STD_TORCH_CHECK(static_cast<Keep>(keep) != Keep::output || !plan.view.autoregressive,
                  "flow_program: backward cannot invert an autoregressive layer");
}

template <class T> int64_t chosen(const Plan &plan, int64_t batch, bool inverse, int64_t keep) {
  if (keep != automatic)
    return keep;
  const bool wide = IIN_FAST_LOOP(program_is_wide<T>)(plan.view, batch, inverse);
  const int64_t bytes = wide ? automatic_wide_bytes : automatic_bytes;
  for (const Keep most : {Keep::all, Keep::inputs})
    if (batch == 0 || (wide && most == Keep::inputs) ||
        IIN_FAST_LOOP(program_saved_size<T>)(plan.view, batch, inverse, most) <= bytes / int64_t(sizeof(T)))
      return static_cast<int64_t>(most);
  return static_cast<int64_t>(Keep::nothing);
}

// Freeing a mapped block of this size raises what glibc keeps at the end of its heap; else what forward saves and
// gradients may be given back to the system at every step, and their pages cleared anew.
void keep_heap() {
  static const bool freed = [] {
    void *volatile block = ::operator new(8 << 20);
    ::operator delete(block);
    return true;
  }();
  (void)freed;
}

std::tuple<Tensor, Tensor, Tensor> flow_program(const Tensor &x,                      // [batch, dim]
                                                const std::optional<Tensor> &context, // [batch, context]
                                                const std::vector<Tensor> &parameters, StringHandle program,
                                                bool inverse, bool base, int64_t keep, int64_t /* tf32 */) {
  const std::shared_ptr<const Plan> plan = plan_of(text_of(program));
  check_keep(*plan, keep);
  const Inputs in = checked_on_cpu(*plan, x, context, parameters);
  Tensor y = cpu_empty(in.x, in.x.sizes()), logdet = cpu_empty(in.x, {in.x.size(0)}), saved = y;
  with_type(in.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    ProgramJob<T> job = job_of<T>(*plan, in, inverse, base, chosen<T>(*plan, in.x.size(0), inverse, keep));
    const int64_t size =
        job.batch == 0 ? 0 : IIN_FAST_LOOP(program_saved_size<T>)(plan->view, job.batch, inverse, job.keep);
    keep_heap();
    saved = cpu_empty(in.x, {size});
    if (job.batch == 0)
      return;
    const Workspace workspace(IIN_FAST_LOOP(program_workspace<T>)(job, false) * int64_t(sizeof(T)));
    job.y = static_cast<T *>(y.mutable_data_ptr()), job.logdet = static_cast<T *>(logdet.mutable_data_ptr());
    job.saved = size > 0 ? static_cast<T *>(saved.mutable_data_ptr()) : nullptr;
    job.workspace = workspace.as<T>();
    int64_t unordered = -1;
    with_team(IIN_FAST_LOOP(program_sharing<T>)(job, false),
              [&] { unordered = IIN_FAST_LOOP(program_forward<T>)(job); });
    check_order(unordered);
  });
  return {y, logdet, saved};
}

// The gradients of a call, and what forward gives where it is asked for.
struct Gradients {
  Tensor x, context;
  std::vector<Tensor> parameters;
};

struct Results {
  Tensor y, logdet;
};

Gradients gradients_of(const Plan &plan, const Inputs &in, const std::optional<Tensor> &grad_y,
                       const Tensor &grad_logdet, const Tensor *saved, bool inverse, bool base, int64_t keep,
                       bool context_grad, const std::string &wanted, const Results *results = nullptr) {
  const int64_t batch = in.x.size(0);
  check_gradients(plan, in, grad_y, grad_logdet, wanted);
  std::optional<Tensor> gy;
  if (grad_y.has_value())
    gy = contiguous(*grad_y);
  const Tensor gl = contiguous(grad_logdet);
  keep_heap();
  Tensor grad_x = cpu_empty(in.x, in.x.sizes());
  context_grad = context_grad && in.context.has_value();
  Tensor grad_context = context_grad ? cpu_empty(*in.context, in.context->sizes()) : cpu_empty(in.x, {0});
  std::vector<Tensor> grads;
  grads.reserve(in.parameters.size());
  for (size_t i = 0; i < in.parameters.size(); ++i) {
    const Tensor &t = in.parameters[i];
    const bool fresh = batch == 0 || plan.view.shared || plan.read[i] != t.numel();
    grads.push_back(wanted[i] != '1' ? cpu_empty(in.x, {0})
                    : fresh          ? new_zeros(t, t.sizes())
                                     : cpu_empty(t, t.sizes()));
  }
  with_type(in.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (batch == 0)
      return;
    ProgramBackwardJob<T> job{};
    job.forward = job_of<T>(plan, in, inverse, base, chosen<T>(plan, batch, inverse, keep));
    std::optional<Tensor> kept;
    if (saved != nullptr) {
      STD_TORCH_CHECK(saved->numel() ==
                          IIN_FAST_LOOP(program_saved_size<T>)(plan.view, batch, inverse, job.forward.keep),
                      "flow_program: saved is not of this program and batch");
      kept = contiguous(*saved);
      job.forward.saved = kept->numel() > 0 ? static_cast<T *>(kept->mutable_data_ptr()) : nullptr; // only read
    }
    if (results != nullptr) {
      kept = cpu_empty(in.x, {IIN_FAST_LOOP(program_ahead_size<T>)(plan.view, batch, inverse)});
      job.forward.keep = kept->numel() > 0 ? Keep::all : Keep::nothing;
      job.forward.saved = kept->numel() > 0 ? static_cast<T *>(kept->mutable_data_ptr()) : nullptr;
      job.forward.y = static_cast<T *>(results->y.mutable_data_ptr());
      job.forward.logdet = static_cast<T *>(results->logdet.mutable_data_ptr());
    }
    const Workspace workspace(IIN_FAST_LOOP(program_workspace<T>)(job.forward, true) * int64_t(sizeof(T)));
    job.forward.workspace = workspace.as<T>();
    std::vector<T *> pointers(grads.size());
    for (size_t i = 0; i < grads.size(); ++i)
      pointers[i] = wanted[i] == '1' ? static_cast<T *>(grads[i].mutable_data_ptr()) : nullptr;
    job.grad_y = gy.has_value() ? static_cast<const T *>(gy->const_data_ptr()) : nullptr;
    job.grad_logdet = static_cast<const T *>(gl.const_data_ptr());
    job.grad_x = static_cast<T *>(grad_x.mutable_data_ptr());
    job.grad_context = context_grad ? static_cast<T *>(grad_context.mutable_data_ptr()) : nullptr;
    job.grads = pointers.data();
    int64_t unordered = -1;
    with_team(IIN_FAST_LOOP(program_sharing<T>)(job.forward, true),
              [&] { unordered = IIN_FAST_LOOP(program_backward<T>)(job); });
    check_order(unordered);
  });
  return {grad_x, grad_context, grads};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>>
flow_program_backward(const std::optional<Tensor> &grad_y, // [batch, dim], none for 0
                      const Tensor &grad_logdet,           // [batch]
                      const Tensor &x,                     // [batch, dim]
                      const Tensor &saved, const std::optional<Tensor> &context, const std::vector<Tensor> &parameters,
                      StringHandle program, bool inverse, bool base, int64_t keep, bool context_grad,
                      StringHandle wanted, int64_t /* tf32 */) {
  const std::string wanted_text = text_of(wanted);
  const std::shared_ptr<const Plan> plan = plan_of(text_of(program));
  check_keep(*plan, keep);
  const Inputs in = checked_on_cpu(*plan, x, context, parameters);
  const Gradients found =
      gradients_of(*plan, in, grad_y, grad_logdet, &saved, inverse, base, keep, context_grad, wanted_text);
  return {found.x, found.context, found.parameters};
}

// Whether forward and backward in one are worth it. Threads that share each step gain nothing until backward would have
// to compute nets again.
bool flow_program_gains_ahead(StringHandle program, int64_t batch, int64_t item, bool inverse) {
  const std::shared_ptr<const Plan> plan = plan_of(text_of(program));
  const auto gains = [&](auto type) {
    using T = decltype(type);
    return !IIN_FAST_LOOP(program_is_wide<T>)(plan->view, batch, inverse) ||
           chosen<T>(*plan, batch, inverse, automatic) != static_cast<int64_t>(Keep::all);
  };
  return item == 8 ? gains(double()) : gains(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>
flow_program_ahead(const Tensor &grad_logdet, // [batch]
                   const Tensor &x,           // [batch, dim]
                   const std::optional<Tensor> &context, const std::vector<Tensor> &parameters, StringHandle program,
                   bool inverse, bool base, bool context_grad, StringHandle wanted) {
  const std::string wanted_text = text_of(wanted);
  const std::shared_ptr<const Plan> plan = plan_of(text_of(program));
  const Inputs in = checked_on_cpu(*plan, x, context, parameters);
  const Results results{cpu_empty(in.x, in.x.sizes()), cpu_empty(in.x, {in.x.size(0)})};
  const Gradients found = gradients_of(*plan, in, std::nullopt, grad_logdet, nullptr, inverse, base,
                                       static_cast<int64_t>(Keep::nothing), context_grad, wanted_text, &results);
  return {results.y, results.logdet, found.x, found.context, found.parameters};
}

// The mean over rows of -log p(x), and its gradients.
std::tuple<Tensor, std::vector<Tensor>> flow_program_nll(const Tensor &x, // [batch, dim]
                                                         const std::optional<Tensor> &context,
                                                         const std::vector<Tensor> &parameters, StringHandle program,
                                                         StringHandle wanted) {
  const std::string wanted_text = text_of(wanted);
  const std::shared_ptr<const Plan> plan = plan_of(text_of(program));
  const Inputs in = checked_on_cpu(*plan, x, context, parameters);
  const int64_t batch = in.x.size(0);
  const Results results{cpu_empty(in.x, in.x.sizes()), cpu_empty(in.x, {batch})};
  Tensor grad = cpu_empty(in.x, {batch}), loss = cpu_empty(in.x, {});
  with_type(in.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::fill_n(static_cast<T *>(grad.mutable_data_ptr()), batch, T(-1) / T(batch));
  });
  Gradients found = gradients_of(*plan, in, std::nullopt, grad, nullptr, false, true,
                                 static_cast<int64_t>(Keep::nothing), false, wanted_text, &results);
  with_type(in.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *log_prob = static_cast<const T *>(results.logdet.const_data_ptr());
    CompensatedSum<double> sum;
    add_terms<T>(sum, batch, [&](int64_t i) __attribute__((always_inline)) { return log_prob[i]; });
    *static_cast<T *>(loss.mutable_data_ptr()) = static_cast<T>(-sum.total() / double(batch));
  });
  return {loss, std::move(found.parameters)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("flow_program(Tensor x, Tensor? context, Tensor[] parameters, str program, bool inverse, bool base, int keep,"
        " int tf32=0) -> (Tensor, Tensor, Tensor)");
  m.def("flow_program_backward(Tensor? grad_y, Tensor grad_logdet, Tensor x, Tensor saved, Tensor? context,"
        " Tensor[] parameters, str program, bool inverse, bool base, int keep, bool context_grad, str wanted,"
        " int tf32=0) -> (Tensor, Tensor, Tensor[])");
  m.def("flow_program_ahead(Tensor grad_logdet, Tensor x, Tensor? context, Tensor[] parameters, str program,"
        " bool inverse, bool base, bool context_grad, str wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def("flow_program_nll(Tensor x, Tensor? context, Tensor[] parameters, str program, str wanted)"
        " -> (Tensor, Tensor[])");
  m.def("flow_program_gains_ahead(str program, int batch, int item, bool inverse) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) {
  m.impl("flow_program_gains_ahead", TORCH_BOX(&flow_program_gains_ahead));
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) {
  m.impl("flow_program", TORCH_BOX(&flow_program));
  m.impl("flow_program_backward", TORCH_BOX(&flow_program_backward));
  m.impl("flow_program_ahead", TORCH_BOX(&flow_program_ahead));
  m.impl("flow_program_nll", TORCH_BOX(&flow_program_nll));
}

} // namespace iin_fast
