#include "flow_program/flow_program_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include <torch/headeronly/util/Exception.h>

#include "affine_coupling/affine_coupling.h"
#include "flow/flow.h"

namespace iin_fast {
namespace {

constexpr int64_t most = int64_t(1) << 24; // of any size in a text: products of two fit 64 bits

// Rows of an accumulator begin on whole vectors of every instruction set.
int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

class Parser {
public:
  Parser(const std::string &text, Plan &plan) : at_(text.c_str()), end_(at_ + text.size()), plan_(plan) {}

  void parse() {
    check(word() == "flow" && integer(1, 1) == 1, "expected a text that begins with 'flow 1'");
    ProgramView &view = plan_.view;
    view.dim = integer(1, most), view.context = integer(0, most), view.tensors = integer(0, most);
    view.layer_count = integer(0, most);
    plan_.needed.assign(view.tensors, 0);
    // the loops hold pointers into these
    plan_.layers.reserve(view.layer_count);
    for (layer_ = 0; layer_ < view.layer_count; ++layer_)
      plan_.layers.push_back(layer());
    layer_ = -1;
    skip();
    check(at_ == end_, "expected the end of the text after the last layer");
    for (const ProgramLayer &l : plan_.layers)
      view.net_rows = std::max(view.net_rows, l.net_rows);
    find_overlaps();
    find_chains();
    view.widest = std::max({view.widest, view.dim, view.context});
    view.layers = plan_.layers.data();
  }

private:
  template <class... Words> void check(bool ok, const Words &...words) const {
    if (layer_ >= 0) {
      STD_TORCH_CHECK(ok, "flow_program: layer ", layer_, ": ", words...);
    } else {
      STD_TORCH_CHECK(ok, "flow_program: ", words...);
    }
  }

  void skip() {
    while (at_ < end_ && *at_ == ' ')
      ++at_;
  }

  std::string word() {
    skip();
    const char *first = at_;
    while (at_ < end_ && *at_ != ' ')
      ++at_;
    return std::string(first, at_);
  }

  int64_t integer(int64_t least, int64_t greatest) {
    const std::string token = word();
    char *rest = nullptr;
    const long long value = std::strtoll(token.c_str(), &rest, 10);
    check(!token.empty() && *rest == 0 && value >= least && value <= greatest, "got '", token,
          "', expected an integer from ", least, " to ", greatest);
    return value;
  }

  double number() {
    const std::string token = word();
    char *rest = nullptr;
    const double value = std::strtod(token.c_str(), &rest);
    check(!token.empty() && *rest == 0 && std::isfinite(value), "got '", token, "', expected a number");
    return value;
  }

  // Which tensors are read in full, and whether an element is read twice.
  void find_overlaps() {
    std::vector<ParameterUse> uses;
    for (const ParameterUse &use : plan_.uses)
      if (use.kind == ParameterUse::value)
        uses.push_back(use);
    std::sort(uses.begin(), uses.end(), [](const ParameterUse &a, const ParameterUse &b) {
      return a.ref.tensor != b.ref.tensor ? a.ref.tensor < b.ref.tensor : a.ref.offset < b.ref.offset;
    });
    plan_.read.assign(plan_.view.tensors, 0);
    int64_t tensor = -1, end = 0;
    for (const ParameterUse &use : uses) {
      if (use.ref.tensor != tensor)
        tensor = use.ref.tensor, end = 0;
      if (use.ref.offset < end)
        plan_.view.shared = true;
      end = std::max(end, use.ref.offset + use.count);
      plan_.read[tensor] += use.count;
    }
  }

  ParameterRef ref(int64_t count, bool needed, ParameterUse::Kind kind = ParameterUse::value) {
    ParameterRef r;
    r.tensor = integer(-1, plan_.view.tensors - 1);
    r.offset = integer(0, int64_t(1) << 48);
    check(r.present() || !needed, "a parameter is missing");
    if (r.present()) {
      plan_.uses.push_back({r, count, kind, layer_});
      plan_.needed[r.tensor] = std::max(plan_.needed[r.tensor], r.offset + count);
    }
    return r;
  }

  int64_t take_packed(int64_t count) {
    const int64_t at = plan_.view.packed_size;
    plan_.view.packed_size += padded(count);
    return at;
  }

  static int64_t take(int64_t &size, int64_t count) {
    const int64_t at = size;
    size += padded(count);
    return at;
  }
  int64_t take_gradient(int64_t count) { return take(plan_.view.layer_gradients, count); }
  int64_t take_net_gradient(int64_t count) { return take(plan_.view.net_gradients, count); }

  const int64_t *keep(std::vector<int64_t> indices) {
    plan_.indices.push_back(std::move(indices));
    return plan_.indices.back().data();
  }

  std::vector<int64_t> features(int64_t count, std::vector<bool> &seen) {
    std::vector<int64_t> found(count);
    for (int64_t &i : found) {
      i = integer(0, plan_.view.dim - 1);
      check(!seen[i], "feature ", i, " appears twice");
      seen[i] = true;
    }
    return found;
  }

  ProgramLayer layer(int depth = 0) {
    const int64_t dim = plan_.view.dim;
    ProgramLayer l;
    const std::string kind = word();
    if (kind == "inverse") {
      check(depth < 64, "too many 'inverse' before a layer");
      l = layer(depth + 1);
      l.inverted = !l.inverted;
    } else if (kind == "affine") {
      l.kind = LayerKind::affine;
      l.order = integer(0, 1), l.form = static_cast<ScaleForm>(integer(0, 2)), l.eps = number();
      l.shift = ref(dim, false), l.scale = ref(dim, false);
      l.packed = take_packed(dim), take_packed(1);
      l.gradient = take_gradient(2 * dim * 16), take_gradient(16);
    } else if (kind == "permute") {
      l.kind = LayerKind::permute;
      std::vector<bool> seen(dim);
      l.index = keep(features(dim, seen)), l.index_count = dim;
    } else if (kind == "shuffle") {
      l.kind = LayerKind::permute;
      l.index_at = ref(dim, true, ParameterUse::index), l.index_count = dim;
    } else if (kind == "linear") {
      l.kind = LayerKind::linear;
      l.storage = integer(0, 1), l.form = static_cast<ScaleForm>(integer(0, 2)), l.eps = number();
      const int64_t triangle = dim * (dim - 1) / 2;
      l.lower = ref(l.storage == 0 ? triangle : dim * dim, true);
      l.upper = ref(triangle, l.storage == 0), l.scale = ref(dim, l.storage == 0), l.shift = ref(dim, false);
      check(l.storage == 0 || (!l.upper.present() && !l.scale.present()),
            "a linear layer of one matrix has no upper or diagonal of its own");
      l.packed = take_packed(dim * dim);
      take_packed(dim * dim), take_packed(1);
      l.gradient = take_gradient(dim * padded(dim));
      take_gradient(dim * padded(dim)), take_gradient(dim * 16), take_gradient(16);
    } else if (kind == "activation") {
      l.kind = LayerKind::activation;
      l.slope = number(), l.exact = integer(0, 1);
      check(l.slope > 0, "slope is ", l.slope, ", expected above 0");
    } else if (kind == "coupling" || kind == "autoregressive") {
      l.kind = LayerKind::coupling;
      l.autoregressive = kind == "autoregressive";
      std::vector<int64_t> conditioning(dim), transformed(dim), passed;
      if (l.autoregressive) {
        for (int64_t i = 0; i < dim; ++i)
          conditioning[i] = transformed[i] = i;
      } else {
        std::vector<bool> seen(dim), moved(dim);
        conditioning = features(integer(0, dim), seen);
        transformed = features(integer(0, dim), seen);
        for (int64_t i : transformed)
          moved[i] = true;
        for (int64_t i = 0; i < dim; ++i)
          if (!moved[i])
            passed.push_back(i);
      }
      l.index_count = conditioning.size(), l.transformed_count = transformed.size(), l.passed_count = passed.size();
      l.index = keep(std::move(conditioning)), l.transformed = keep(std::move(transformed));
      l.passed = keep(std::move(passed));
      plan_.view.autoregressive = plan_.view.autoregressive || l.autoregressive;
      net(l);
      transformer(l);
    } else {
      check(false, "got '", kind, "', expected a kind of layer");
    }
    return l;
  }

  void net(ProgramLayer &l) {
    check(word() == "net", "expected 'net'");
    const int64_t count = integer(0, most);
    std::vector<int64_t> rows = {l.index_count, plan_.view.context};
    std::vector<int64_t> readers = {1, 1}; // of each value; the first two are never overwritten
    std::vector<ProgramStep> steps;
    const auto source = [&] {
      const int64_t id = integer(0, static_cast<int64_t>(rows.size()) - 1);
      check(id != 1 || plan_.view.context > 0, "a step reads the context, but the program has none");
      ++readers[id];
      return id;
    };
    for (int64_t i = 0; i < count; ++i) {
      ProgramStep s;
      const std::string kind = word();
      int64_t made = 0;
      if (kind == "dense" || kind == "panels") {
        s.kind = StepKind::dense, s.panels = kind == "panels";
        s.a = source(), s.in = rows[s.a], s.out = made = integer(1, most);
        s.weight = ref(s.in * s.out, true), s.bias = ref(s.out, false);
        s.mask = ref(s.in * s.out, false, ParameterUse::mask);
        check(!s.panels || (!s.mask.present() && !l.autoregressive),
              "panels with a mask, or in an autoregressive layer");
        if (s.mask.present())
          s.packed = take_packed(s.in * s.out);
        const int64_t rest = s.out % panel_width;
        s.weight_gradient = take_net_gradient(s.panels ? s.in * (s.out - rest + padded(rest)) : s.out * padded(s.in));
        s.bias_gradient = take_net_gradient(s.out * 16);
      } else if (kind == "act") {
        s.kind = StepKind::act;
        s.activation = static_cast<Activation>(integer(0, 8)), s.slope = number(), s.a = source();
        made = rows[s.a];
      } else if (kind == "add" || kind == "glu") {
        s.kind = kind == "add" ? StepKind::add : StepKind::glu;
        s.a = source(), s.b = source(), made = rows[s.a];
        check(rows[s.b] == made, kind, " of values with ", made, " and ", rows[s.b], " features");
      } else if (kind == "concat") {
        s.kind = StepKind::concat;
        s.a = source(), s.b = source(), made = rows[s.a] + rows[s.b];
      } else if (kind == "context") {
        s.kind = StepKind::context, s.a = 1;
        s.first = integer(0, most), made = integer(1, most);
        check(!l.autoregressive, "a part of the context in an autoregressive layer");
        check(s.first + made <= plan_.view.context, "features ", s.first, " to ", s.first + made - 1,
              " of the context, which has ", plan_.view.context);
      } else {
        check(false, "got '", kind, "', expected a kind of step");
      }
      steps.push_back(s), rows.push_back(made), readers.push_back(0);
      check(made <= most, "a value is too wide");
      plan_.view.widest = std::max(plan_.view.widest, made);
    }
    const int64_t output_count = integer(1, count + 2);
    std::vector<int64_t> outputs(output_count);
    std::vector<bool> is_output(rows.size());
    for (int64_t &id : outputs) {
      id = integer(2, static_cast<int64_t>(rows.size()) - 1);
      check(!is_output[id], "value ", id, " is an output twice");
      is_output[id] = true;
    }
    // Where the values lie: outputs side by side, an activation in the place of what it reads where nobody else needs
    // that and its derivative can be had from its result.
    std::vector<ProgramValue> values(rows.size());
    const auto place = [&](int64_t id) { values[id] = {rows[id], l.net_rows}, l.net_rows += rows[id]; };
    place(0);
    l.output_at = l.raw_at = l.net_rows;
    for (int64_t id : outputs) {
      place(id);
      l.reread = l.reread || readers[id] > 0 || steps[id - 2].kind == StepKind::act;
    }
    l.raw_rows = l.net_rows - l.output_at;
    for (int64_t k = 0; k < count; ++k) {
      const ProgramStep &s = steps[k];
      const int64_t id = 2 + k;
      if (is_output[id])
        continue;
      const bool from_result = s.kind == StepKind::act && s.activation != Activation::silu &&
                               s.activation != Activation::gelu && s.activation != Activation::atan;
      if (from_result && s.a >= 2 && readers[s.a] == 1 && !is_output[s.a] && steps[s.a - 2].kind != StepKind::act)
        values[id] = values[s.a];
      else
        place(id);
    }
    find_chain(l, steps, outputs, rows);
    plan_.steps.push_back(std::move(steps)), plan_.values.push_back(std::move(values));
    l.steps = plan_.steps.back().data(), l.values = plan_.values.back().data(), l.step_count = count;
  }

  // Whether the steps are chains, see ProgramLayer.
  void find_chain(ProgramLayer &l, const std::vector<ProgramStep> &steps, const std::vector<int64_t> &outputs,
                  const std::vector<int64_t> &rows) const {
    const int64_t count = steps.size(), chains = outputs.size();
    int64_t at = 0, first = 0;
    if (at < count && steps[at].kind == StepKind::context)
      l.context_first = steps[at].first, l.context_count = rows[2 + at], ++at;
    if (at < count && steps[at].kind == StepKind::concat) {
      if (steps[at].a != 0 || steps[at].b != (at == 1 ? 2 : 1))
        return;
      l.context_count = rows[steps[at].b], first = 2 + at++;
    } else if (at > 0) {
      return;
    }
    const int64_t each = (count - at) / chains, layers = (each + 1) / 2;
    if (l.autoregressive || l.index_count == 0 || count == at || each * chains != count - at || each % 2 == 0)
      return;
    for (int64_t n = 0; n < chains; ++n) {
      if (outputs[n] != 2 + at + n * each + each - 1)
        return;
      for (int64_t i = 0; i < each; ++i) {
        const int64_t k = at + n * each + i;
        const ProgramStep &s = steps[k], &same = steps[at + i], &act = steps[at + (each > 1)];
        if (s.a != (i == 0 ? first : 1 + k))
          return;
        if (i % 2 == 0 ? !s.panels || s.out != same.out
                       : s.kind != StepKind::act || s.activation != Activation::leaky_relu || s.slope != act.slope)
          return;
      }
    }
    l.chain = at, l.chains = chains, l.chain_layers = layers, l.chain_slope = each > 1 ? steps[at + 1].slope : 0;
  }

  void find_chains() {
    ProgramView &view = plan_.view;
    bool all = true;
    int64_t couplings = 0;
    for (const ProgramLayer &l : plan_.layers) {
      if (l.kind != LayerKind::coupling)
        continue;
      ++couplings, all = all && l.chains > 0;
      int64_t weights = 0;
      for (int64_t i = 0; i < l.chain_layers; ++i) {
        const ProgramStep &s = l.steps[l.chain + 2 * i];
        weights += s.in * s.out;
        view.chain_layer = std::max(view.chain_layer, l.chains * s.in * s.out);
      }
      view.chain_weights = std::max(view.chain_weights, weights);
    }
    view.chains = all && couplings > 0;
  }

  void transformer(ProgramLayer &l) {
    std::string kind = word();
    if (kind == "wrapped") {
      l.spline.wrap = true, kind = word();
      check(kind == "spline", "got 'wrapped ", kind, "', expected a spline");
    }
    const int64_t last = l.transformed_count - 1;
    if (kind == "affine") {
      l.transformer = TransformerKind::affine;
      AffineTransformer &t = l.affine;
      t.squash = integer(0, squash_count - 1), t.clamp = number(), t.gain = number();
      t.scale_at = integer(-1, most), t.scale_step = integer(0, most);
      t.shift_at = integer(0, most), t.shift_step = integer(0, most);
      const bool additive = t.squash == static_cast<int64_t>(Squash::none);
      check(additive == (t.scale_at < 0), "a raw scale belongs to every squash but that of an additive coupling");
      check(last < 0 || (t.shift_at + last * t.shift_step < l.raw_rows &&
                         (additive || t.scale_at + last * t.scale_step < l.raw_rows)),
            "the net makes ", l.raw_rows, " raw values, fewer than the transformer reads");
    } else {
      check(kind == "spline", "got '", kind, "', expected a kind of transformer");
      l.transformer = TransformerKind::spline;
      SplineTransformer &t = l.spline;
      t.bins = integer(1, most), t.tails = integer(0, 2), t.form = integer(0, 1);
      SplineLimits<double> &s = t.limits;
      s.left = number(), s.right = number(), s.bottom = number(), s.top = number();
      s.min_width = number(), s.min_height = number(), s.min_derivative = number(), t.gain = number();
      check(s.left < s.right && s.bottom < s.top, "a spline's box is empty");
      const bool zuko = t.form == static_cast<int64_t>(Parameterization::zuko);
      check(!zuko || (s.min_derivative > 0 && s.min_derivative < 1), "min_derivative is ", s.min_derivative,
            ", expected between 0 and 1");
      s.softness = zuko ? 1 / std::log(s.min_derivative) : 0;
      t.count = 2 * t.bins + derivative_count(static_cast<Tails>(t.tails), t.bins);
      check((last + 1) * t.count == l.raw_rows, "the net makes ", l.raw_rows, " raw values, expected ",
            (last + 1) * t.count);
      if (l.reread && (t.gain != 1 || l.autoregressive))
        l.raw_at = l.net_rows, l.net_rows += l.raw_rows;
    }
  }

  const char *at_, *end_;
  Plan &plan_;
  int64_t layer_ = -1;
};

} // namespace

std::shared_ptr<const Plan> plan_of(const std::string &text) {
  // The last plan of a thread is at hand without a lock: a training step asks for the same one twice.
  thread_local std::string last_text;
  thread_local std::shared_ptr<const Plan> last;
  if (last != nullptr && text == last_text)
    return last;
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Plan>> plans;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(text);
  if (found == plans.end()) {
    auto plan = std::make_shared<Plan>();
    Parser(text, *plan).parse();
    if (plans.size() >= 256) // a search over architectures must not fill the memory
      plans.clear();
    found = plans.emplace(text, std::move(plan)).first;
  }
  last_text = text, last = found->second;
  return last;
}

} // namespace iin_fast
