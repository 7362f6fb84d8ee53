// flow_program on a GPU: tensor checks, memory and the launches. The kernels are in flow_program_kernels.cuh.
#include <mutex>
#include <unordered_map>

#include "common/cuda.h"
#include "flow_program/flow_program_checks.h"
#include "flow_program/flow_program_kernels.cuh"

namespace iin_fast {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

// The tables of a text for elements of `item` bytes, with or without tensor cores, made once and kept with their copies
// on devices.
struct KeptTable {
  std::shared_ptr<const Plan> plan;
  Table tables[2]; // of the walk forward, and of that back
  std::mutex mutex;
  std::unordered_map<int, Tensor> copies[2]; // by device
};

std::shared_ptr<KeptTable> kept_table(const std::string &text, int item, bool tensor) {
  thread_local std::string last_text;
  thread_local int last_item = 0;
  thread_local bool last_tensor = false;
  thread_local std::shared_ptr<KeptTable> last;
  if (last != nullptr && item == last_item && tensor == last_tensor && text == last_text)
    return last;
  static std::mutex mutex;
  static auto &tables = *new std::unordered_map<std::string, std::shared_ptr<KeptTable>>; // outlives torch's CUDA
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<KeptTable> &kept = tables[text + (tensor ? " tensor" : item == 8 ? " double" : " float")];
  if (kept == nullptr) {
    auto made = std::make_shared<KeptTable>();
    made->plan = plan_of(text);
    for (const bool back : {false, true})
      made->tables[back] = table_of(made->plan->view, item, back, tensor);
    kept = made;
  }
  last_text = text, last_item = item, last_tensor = tensor, last = kept;
  if (tables.size() > 256) // a search over architectures must not fill the memory
    tables.clear();
  return last;
}

// A copy of one of them on the device of a call. The first call waits for it; one inside a CUDA graph puts the copy in
// the graph.
Tensor on_device(KeptTable &kept, bool back, const CudaCall &call, const Tensor &like) {
  const int device = like.get_device_index();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  auto &copies = kept.copies[back];
  if (const auto found = copies.find(device); found != copies.end())
    return found->second;
  Tensor copy = new_empty(like, {static_cast<int64_t>(kept.tables[back].bytes.size()) + 16}, ScalarType::Byte);
  launch_program_table(kept.tables[back], mutable_data<unsigned char>(copy), call);
  if (!call.captured()) {
    call.wait();
    copies.emplace(device, copy);
  }
  return copy;
}

// What a walk can do where a block has `room` bytes of shared memory: the sum of 1, forward; 2, inverse; 4 and 8,
// backward of these.
int64_t walks_of(const KeptTable &kept, int item, int64_t room) {
  const Table &table = kept.tables[false];
  if (!table.fits || choose_tile(table.view, 1, item, room, false) < 0)
    return 0;
  const bool back = choose_tile(kept.tables[true].view, 1, item, room, true) >= 0;
  return 3 + (back && !table.sequential[false] ? 4 : 0) + (back && !table.sequential[true] ? 8 : 0);
}

// f(T(), products of TF32 that make one of T) of a call: none of float64, and where the wider panels of tensor cores
// leave no room for what plain products can walk.
template <class F>
void with_products(const CudaCall &call, const Tensor &x, const std::string &text, int64_t tf32, F &&f) {
  STD_TORCH_CHECK(tf32 == 0 || tf32 == 1 || tf32 == 3, "flow_program: tf32 must be 0, 1 or 3");
  with_type(x.scalar_type(), [&](auto type) {
    if constexpr (sizeof(type) == 4) {
      const auto walks = [&](bool tensor) { return walks_of(*kept_table(text, 4, tensor), 4, call.shared_room()); };
      if (tf32 != 0 && walks(true) == walks(false))
        return tf32 == 1 ? f(type, std::integral_constant<int, 1>()) : f(type, std::integral_constant<int, 3>());
    }
    f(type, std::integral_constant<int, 0>());
  });
}

// What both directions of a call have in common.
template <class T, int tf32> struct Call {
  const CudaCall &call;
  const std::shared_ptr<KeptTable> kept;
  const Table &table; // of the walk forward; parts and packed parameters are the same for both
  const Inputs in;
  Tensor packed, orders, bytes;
  DeviceWalk<T, tf32> walk{};

  Call(const CudaCall &call, const std::string &program, const Tensor &x, const std::optional<Tensor> &context,
       const std::vector<Tensor> &parameters, bool inverse, bool base)
      : call(call), kept(kept_table(program, sizeof(T), tf32 != 0)), table(kept->tables[false]),
        in(checked(*kept->plan, x, context, parameters,
                   [&](const Tensor &t) { return t.is_cuda() && t.get_device_index() == x.get_device_index(); })),
        packed(new_empty(x, {table.packed})), orders(new_empty(x, {table.view.orders}, ScalarType::Int)),
        bytes(orders) {
    STD_TORCH_CHECK(table.fits, "flow_program: a GPU cannot walk this program");
    STD_TORCH_CHECK(x.size(0) < int64_t(1) << 31, "flow_program: the batch must have fewer than 2^31 rows on a GPU");
    walk.packed = mutable_data<T>(packed), walk.orders = const_data<int>(orders);
    walk.x = const_data<T>(in.x), walk.context = in.context.has_value() ? const_data<T>(*in.context) : nullptr;
    walk.batch = in.x.size(0), walk.inverse = inverse, walk.base = base;
  }

  void choose(bool backward) {
    const Table &chosen = kept->tables[backward];
    walk.log_rows = choose_tile(chosen.view, walk.batch, sizeof(T), call.shared_room(), backward);
    STD_TORCH_CHECK(walk.log_rows >= 0, "flow_program: the nets of this program are too wide for a walk on this GPU");
    walk.tiles = static_cast<int>((walk.batch + (1 << walk.log_rows) - 1) >> walk.log_rows);
    bytes = on_device(*kept, backward, call, in.x);
    walk.table = const_data<unsigned char>(bytes), walk.view = chosen.view;
  }

  const void *data(const ParameterRef &r) const {
    if (!r.present())
      return nullptr;
    const int64_t item = in.bool_mask[r.tensor]                                      ? 1
                         : in.parameters[r.tensor].scalar_type() == ScalarType::Long ? 8
                                                                                     : sizeof(T);
    return static_cast<const unsigned char *>(in.data[r.tensor]) + r.offset * item;
  }
  bool is_bool(const ParameterRef &r) const { return in.bool_mask[r.tensor] != 0; }

  void pack() {
    launch_program_pack<T>(
        table, [&](const ParameterRef &r) { return data(r); }, [&](const ParameterRef &r) { return is_bool(r); },
        walk.packed, call);
  }

  bool sequential() const { return table.sequential[walk.inverse]; }

  void forward() {
    choose(false);
    launch_program_forward(walk, sequential() ? mutable_data<int>(orders) : nullptr, static_cast<unsigned>(walk.tiles),
                           call);
  }
};

std::tuple<Tensor, Tensor, Tensor> flow_program(const Tensor &x,                      // [batch, dim]
                                                const std::optional<Tensor> &context, // [batch, context]
                                                const std::vector<Tensor> &parameters, StringHandle program,
                                                bool inverse, bool base, int64_t keep, int64_t tf32) {
  const std::string text = text_of(program);
  const CudaCall cuda("flow_program", x);
  Tensor y = new_empty(x, x.sizes()), logdet = new_empty(x, {x.size(0)}), saved = new_empty(x, {0});
  with_products(cuda, x, text, tf32, [&](auto type, auto products) {
    using T = decltype(type);
    Call<T, decltype(products)::value> call(cuda, text, x, context, parameters, inverse, base);
    STD_TORCH_CHECK(keep == 0 || !call.sequential(), "flow_program: a GPU has no backward of an autoregressive layer's "
                                                     "sampling direction");
    if (call.walk.batch == 0)
      return;
    if (keep != 0)
      saved = new_empty(x, {call.table.view.layer_count, x.size(0), x.size(1)});
    call.walk.y = mutable_data<T>(y), call.walk.logdet = mutable_data<T>(logdet);
    call.walk.inputs = keep != 0 ? mutable_data<T>(saved) : nullptr;
    call.pack();
    call.forward();
  });
  return {y, logdet, saved};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>>
flow_program_backward(const std::optional<Tensor> &grad_y, // [batch, dim], none for 0
                      const Tensor &grad_logdet,           // [batch]
                      const Tensor &x,                     // [batch, dim]
                      const Tensor &saved_in, const std::optional<Tensor> &context,
                      const std::vector<Tensor> &parameters, StringHandle program, bool inverse, bool base,
                      int64_t keep, bool context_grad, StringHandle wanted_text, int64_t tf32) {
  const std::string wanted = text_of(wanted_text), text = text_of(program);
  const CudaCall cuda("flow_program_backward", x);
  Tensor grad_x = new_empty(x, x.sizes()), grad_context = new_empty(x, {0});
  std::vector<Tensor> grads;
  with_products(cuda, x, text, tf32, [&](auto type, auto products) {
    using T = decltype(type);
    Call<T, decltype(products)::value> call(cuda, text, x, context, parameters, inverse, base);
    const int64_t batch = call.walk.batch;
    check_gradients(*call.kept->plan, call.in, grad_y, grad_logdet, wanted);
    STD_TORCH_CHECK(!call.sequential(),
                    "flow_program: a GPU has no backward of an autoregressive layer's sampling direction");
    const bool with_context = context_grad && context.has_value();
    if (with_context)
      grad_context = new_empty(*context, context->sizes());
    grads.reserve(parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Tensor &t = call.in.parameters[i];
      grads.push_back(wanted[i] != '1'                                      ? new_empty(x, {0})
                      : batch == 0 || call.kept->plan->read[i] != t.numel() ? new_zeros(t, t.sizes())
                                                                            : new_empty(t, t.sizes()));
    }
    if (batch == 0)
      return;
    const std::optional<Tensor> gy = grad_y.has_value() ? std::optional<Tensor>(contiguous(*grad_y)) : std::nullopt;
    const Tensor gl = contiguous(grad_logdet);
    Tensor inputs = keep != 0 ? contiguous(saved_in) : new_empty(x, {call.table.view.layer_count, batch, x.size(1)});
    STD_TORCH_CHECK(inputs.numel() == call.table.view.layer_count * x.numel(),
                    "flow_program: saved is not of this program and batch");
    DeviceWalkBack<T, decltype(products)::value> back{};
    call.walk.inputs = mutable_data<T>(inputs);
    call.pack();
    if (keep == 0) {
      Tensor y = new_empty(x, x.sizes()), logdet = new_empty(x, {batch});
      call.walk.y = mutable_data<T>(y), call.walk.logdet = mutable_data<T>(logdet);
      call.forward();
    }
    call.choose(true);
    back.walk = call.walk;
    Tensor accumulators = new_empty(x, {program_accumulators(call.walk) * call.walk.view.accumulator});
    back.grad_y = gy.has_value() ? const_data<T>(*gy) : nullptr, back.grad_logdet = const_data<T>(gl);
    back.grad_x = mutable_data<T>(grad_x);
    back.grad_context = with_context ? mutable_data<T>(grad_context) : nullptr;
    back.accumulators = mutable_data<T>(accumulators);
    launch_program_backward(back, cuda);
    launch_program_sum(
        call.table, back, [&](const ParameterRef &r) { return call.data(r); },
        [&](const ParameterRef &r) -> T * {
          return r.present() && wanted[r.tensor] == '1' ? mutable_data<T>(grads[r.tensor]) + r.offset : nullptr;
        },
        [&](const ParameterRef &r) { return call.is_bool(r); }, cuda);
  });
  return {grad_x, grad_context, grads};
}

// walks_of() a program of elements of `item` bytes on a GPU.
int64_t cuda_program_walks(StringHandle program, int64_t item, int64_t device) {
  const std::string text = text_of(program);
  const CudaDriver *const driver = cuda_driver();
  CUdevice handle = 0;
  int room = 0;
  if (driver == nullptr || driver->cuDeviceGet(&handle, static_cast<int>(device)) != CUDA_SUCCESS ||
      driver->cuDeviceGetAttribute(&room, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, handle) !=
          CUDA_SUCCESS)
    return 0;
  return walks_of(*kept_table(text, static_cast<int>(item), false), static_cast<int>(item), room);
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) { m.def("cuda_program_walks(str program, int item, int device) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_program_walks", TORCH_BOX(&cuda_program_walks));
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CUDA, m) {
  m.impl("flow_program", TORCH_BOX(&flow_program));
  m.impl("flow_program_backward", TORCH_BOX(&flow_program_backward));
}

} // namespace iin_fast
