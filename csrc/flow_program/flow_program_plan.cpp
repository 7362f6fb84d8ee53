#include "flow_program/flow_program_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#if defined(__linux__)
#include <pthread.h>
#endif

#include <torch/headeronly/util/Exception.h>

#include "affine_coupling/affine_coupling.h"
#include "flow/flow.h"
#include "flow_program/elementwise.h"

namespace iin_fast {
namespace {

constexpr int64_t most = int64_t(1) << 24; // of any size in a text: products of two fit 64 bits
constexpr int64_t most_tensors = int64_t(1) << 16;

// Rows of an accumulator begin on whole vectors of every instruction set.
int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Waves, and where values lie, of a net in the wide walk.
class RowPlanner {
public:
  RowPlanner(std::vector<ProgramStep> &steps, std::vector<ProgramValue> &values, const std::vector<int64_t> &outputs,
             const std::vector<int64_t> &readers)
      : steps_(steps), values_(values), outputs_(outputs), readers_(readers), is_output_(values.size()),
        undone_(steps.size()) {
    for (int64_t id : outputs)
      is_output_[id] = true;
  }

  void plan(ProgramLayer &l, Plan &plan) {
    find_waves(l, plan);
    find_gradients(l);
    place_kept(l);
    place_work(l);
    place_gradients(l);
  }

private:
  struct Slot {
    int64_t width;
    int64_t chain;
    bool free;
  };

  int64_t count() const { return steps_.size(); }
  static bool two(const ProgramStep &s) {
    return s.kind == StepKind::add || s.kind == StepKind::glu || s.kind == StepKind::concat;
  }
  // The first step's value is 2.
  ProgramStep &maker(int64_t id) { return steps_[id - 2]; }

  void find_waves(ProgramLayer &l, Plan &plan) {
    std::vector<int64_t> level(values_.size()); // features and context are there from the start
    for (int64_t k = 0; k < count(); ++k) {
      ProgramStep &s = steps_[k];
      const bool simple = s.activation == Activation::relu || s.activation == Activation::leaky_relu;
      const bool joined = s.kind == StepKind::act && s.in_place && simple && maker(s.a).kind == StepKind::dense;
      if (joined)
        maker(s.a).act = k, s.joined = true;
      level[2 + k] = std::max(level[s.a], two(s) ? level[s.b] : 0) + (joined ? 0 : 1);
      s.wave = level[2 + k] - 1;
      last_ = std::max(last_, s.wave);
    }
    std::vector<int64_t> order;
    std::vector<ProgramWave> waves;
    for (int64_t wave = 0; wave <= last_; ++wave) {
      ProgramWave w{};
      w.first = order.size();
      for (int64_t k = 0; k < count(); ++k)
        if (steps_[k].wave == wave && steps_[k].kind != StepKind::dense && !steps_[k].joined)
          order.push_back(k);
      w.dense = order.size();
      for (int64_t k = 0; k < count(); ++k)
        if (steps_[k].wave == wave && steps_[k].kind == StepKind::dense)
          order.push_back(k);
      w.end = order.size();
      waves.push_back(w);
    }
    order_ = order, waves_ = waves;
    plan.indices.push_back(std::move(order)), plan.waves.push_back(std::move(waves));
    l.by_wave = plan.indices.back().data(), l.waves = plan.waves.back().data(), l.wave_count = last_ + 1;
  }

  // In the order in which backward takes the steps: who comes first to a gradient.
  void find_gradients(ProgramLayer &l) {
    std::vector<bool> seen = is_output_; // these come with theirs
    const auto visit = [&](int64_t id) {
      const bool before = seen[id];
      seen[id] = true;
      return before;
    };
    for (int64_t wave = last_; wave >= 0; --wave)
      for (int64_t i = waves_[wave].first; i < waves_[wave].end; ++i) {
        ProgramStep &s = steps_[order_[i]];
        const int64_t made = s.act >= 0 ? 2 + s.act : 2 + order_[i];
        s.unread = !seen[made];
        if (s.act >= 0)
          s.act_first = !undone_[s.act];
        if (s.kind == StepKind::act && s.in_place) {
          seen[s.a] = true;
          continue;
        }
        s.add_a = visit(s.a);
        if (two(s))
          s.add_b = visit(s.b);
        if (s.kind == StepKind::dense && s.a >= 2 && maker(s.a).joined && readers_[s.a] == 1 && !is_output_[s.a])
          s.undo = s.a - 2, undone_[s.a - 2] = true;
      }
    l.reads_features = seen[0], l.reads_context = seen[1];
  }

  static int64_t stride_of(int64_t width, int type) { // row_stride of wide_net.h
    const int64_t line = type == 0 ? 16 : 8;
    return ((std::max<int64_t>(width, 1) + line - 1) / line | 1) * line;
  }

  void place_kept(ProgramLayer &l) {
    for (int type = 0; type < 2; ++type) {
      for (ProgramValue &v : values_)
        v.row[type].stride = stride_of(v.rows, type);
      for (int64_t id = 2; id < 2 + count(); ++id) {
        RowPlace &place = values_[id].row[type];
        if (maker(id).in_place)
          place.kept = values_[maker(id).a].row[type].kept;
        else
          place.kept = l.kept_stride[type], l.kept_stride[type] += place.stride;
      }
    }
  }

  // Slots that values take one after the other. Chains may run without waiting for each other, so each has its own.
  int64_t take(int64_t width, int64_t chain) {
    for (size_t i = 0; i < slots_.size(); ++i)
      if (slots_[i].free && slots_[i].chain == chain) {
        slots_[i].free = false, slots_[i].width = std::max(slots_[i].width, width);
        return i;
      }
    slots_.push_back({width, chain, false});
    return slots_.size() - 1;
  }
  template <class F> void finish_slots(int64_t *total, const std::vector<int64_t> &slot, const F &put) {
    for (int type = 0; type < 2; ++type) {
      std::vector<int64_t> at;
      for (const Slot &s : slots_)
        at.push_back(total[type]), total[type] += stride_of(s.width, type);
      for (size_t id = 0; id < slot.size(); ++id)
        if (slot[id] >= 0)
          put(values_[id].row[type], at[slot[id]]);
    }
    slots_.clear();
  }

  void place_work(ProgramLayer &l) {
    const int64_t each = l.chains ? (count() - l.chain) / l.chains : 1;
    std::vector<int64_t> slot(values_.size(), -1), until(values_.size(), -1);
    for (int64_t k = 0; k < count(); ++k) {
      until[2 + k] = std::max(until[2 + k], steps_[k].wave);
      for (int64_t id : {steps_[k].a, two(steps_[k]) ? steps_[k].b : 0})
        until[id] = std::max(until[id], steps_[k].wave);
    }
    for (int64_t wave = 0; wave <= last_; ++wave) {
      for (int64_t k = 0; k < count(); ++k)
        if (steps_[k].wave == wave)
          slot[2 + k] = steps_[k].in_place
                            ? slot[steps_[k].a]
                            : take(values_[2 + k].rows, l.chains && k >= l.chain ? (k - l.chain) / each : -1);
      for (int64_t id = 2; id < 2 + count(); ++id)
        if (until[id] == wave && !is_output_[id] && !passed_on(id))
          slots_[slot[id]].free = true;
    }
    finish_slots(l.work_stride, slot, [](RowPlace &place, int64_t at) { place.work = at; });
  }
  // Whether an activation has taken its place.
  bool passed_on(int64_t id) {
    for (int64_t k = id - 1; k < count(); ++k)
      if (steps_[k].in_place && steps_[k].a == id)
        return true;
    return false;
  }

  void place_gradients(ProgramLayer &l) {
    std::vector<int64_t> slot(values_.size(), -1);
    const auto need = [&](int64_t id) {
      if (slot[id] < 0)
        slot[id] = take(values_[id].rows, 0);
    };
    for (int64_t id : outputs_)
      need(id);
    need(0), need(1);
    for (int64_t wave = last_; wave >= 0; --wave) {
      for (int64_t k = count() - 1; k >= 0; --k) {
        const ProgramStep &s = steps_[k];
        if (s.wave != wave)
          continue;
        need(2 + k);
        if (s.in_place)
          slot[s.a] = slot[2 + k];
      }
      for (int64_t k = 0; k < count(); ++k)
        if (steps_[k].wave == wave) {
          need(steps_[k].a);
          if (two(steps_[k]))
            need(steps_[k].b);
        }
      for (int64_t k = 0; k < count(); ++k)
        if (steps_[k].wave == wave && !steps_[k].in_place)
          slots_[slot[2 + k]].free = true;
    }
    finish_slots(l.gradient_stride, slot, [](RowPlace &place, int64_t at) { place.gradient = at; });
  }

  std::vector<ProgramStep> &steps_;
  std::vector<ProgramValue> &values_;
  const std::vector<int64_t> &outputs_, &readers_;
  std::vector<bool> is_output_;
  std::vector<int64_t> order_;
  std::vector<ProgramWave> waves_;
  std::vector<Slot> slots_;
  int64_t last_ = -1;
  std::vector<bool> undone_; // by step: a reader has applied its derivative
};

class Parser {
public:
  Parser(const std::string &text, Plan &plan) : at_(text.c_str()), end_(at_ + text.size()), plan_(plan) {}

  void parse() {
    check(word() == "flow" && integer(1, 1) == 1, "expected a text that begins with 'flow 1'");
    ProgramView &view = plan_.view;
    view.dim = integer(1, most), view.context = integer(0, most), view.tensors = integer(0, most_tensors);
    view.layer_count = integer(0, std::min(most, int64_t(end_ - at_))); // each takes a word
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
    find_sizes();
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

  // Of these characters alone, and read to its end: strtoll and strtod take spaces, signs and bases that no text has.
  static bool is_number(const std::string &token, const char *characters, const char *rest) {
    return !token.empty() && token[0] != '+' && token.find_first_not_of(characters) == std::string::npos &&
           rest == token.c_str() + token.size();
  }

  int64_t integer(int64_t least, int64_t greatest) {
    const std::string token = word();
    char *rest = nullptr;
    const long long value = std::strtoll(token.c_str(), &rest, 10);
    check(is_number(token, "-0123456789", rest) && value >= least && value <= greatest, "got '", token,
          "', expected an integer from ", least, " to ", greatest);
    return value;
  }

  double number() {
    const std::string token = word();
    char *rest = nullptr;
    const double value = std::strtod(token.c_str(), &rest);
    check(is_number(token, "+-.0123456789eE", rest) && std::isfinite(value), "got '", token, "', expected a number");
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
    check(r.present() || (!needed && r.offset == 0), "a parameter is missing");
    if (r.present()) {
      plan_.uses.push_back({r, count, kind, layer_});
      plan_.needed[r.tensor] = std::max(plan_.needed[r.tensor], r.offset + count);
    }
    return r;
  }

  int64_t take_packed(int64_t count) { return take(plan_.view.packed_size, count); }

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

  ProgramLayer layer(bool inverted = false) {
    const int64_t dim = plan_.view.dim;
    ProgramLayer l;
    const std::string kind = word();
    if (kind == "inverse") {
      check(!inverted, "got 'inverse' twice");
      l = layer(true);
      l.inverted = true;
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
      check(rows[id] > 0, "value ", id, " is empty: ", id == 1 ? "the program has no context" : "nothing conditions");
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
          s.packed = take(plan_.view.masked_size, s.in * s.out);
        const int64_t rest = s.out % panel_width;
        s.weight_gradient = take_net_gradient(s.panels ? s.in * (s.out - rest + padded(rest)) : s.out * padded(s.in));
        s.bias_gradient = take_net_gradient(s.out * 16);
      } else if (kind == "act") {
        s.kind = StepKind::act;
        s.activation = static_cast<Activation>(integer(0, 8)), s.slope = number(), s.a = source();
        // derivatives of these two are told from the sign of the result
        check(s.slope >= 0 || (s.activation != Activation::leaky_relu && s.activation != Activation::elu),
              "a slope of ", s.slope, ", expected 0 or more");
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
    const auto place = [&](int64_t id) { values[id] = {rows[id], l.net_rows, {}}, l.net_rows += rows[id]; };
    place(0), values[1].rows = plan_.view.context;
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
      const bool from_result = s.kind == StepKind::act && !derivative_reads_input(s.activation);
      if (from_result && s.a >= 2 && readers[s.a] == 1 && !is_output[s.a] && steps[s.a - 2].kind != StepKind::act)
        values[id] = values[s.a], steps[k].in_place = true;
      else
        place(id);
    }
    find_chains(l, steps, outputs);
    RowPlanner(steps, values, outputs, readers).plan(l, plan_);
    plan_.steps.push_back(std::move(steps)), plan_.values.push_back(std::move(values));
    l.steps = plan_.steps.back().data(), l.values = plan_.values.back().data(), l.step_count = count;
    l.output_count = outputs.size(), l.outputs = keep(std::move(outputs));
  }

  // Whether the steps are nets of equal length side by side, see ProgramLayer.
  static void find_chains(ProgramLayer &l, const std::vector<ProgramStep> &steps, const std::vector<int64_t> &outputs) {
    const int64_t count = steps.size(), chains = outputs.size();
    int64_t at = 0;
    while (at < count && steps[at].kind != StepKind::dense)
      ++at;
    const int64_t each = (count - at) / chains, first = at < count ? steps[at].a : 0;
    if (each == 0 || each * chains != count - at)
      return;
    for (int64_t n = 0; n < chains; ++n)
      for (int64_t k = at + n * each; k < at + (n + 1) * each; ++k) {
        const bool begins = k == at + n * each, ends = k + 1 == at + (n + 1) * each;
        const bool dense = steps[k].kind == StepKind::dense;
        if ((!dense && steps[k].kind != StepKind::act) || steps[k].a != (begins ? first : 1 + k) ||
            (begins && !dense) || (ends && outputs[n] != 2 + k))
          return;
      }
    l.chain = at, l.chains = chains;
  }

  void find_sizes() {
    ProgramView &view = plan_.view;
    for (const ProgramLayer &l : plan_.layers) {
      if (l.kind != LayerKind::coupling)
        continue;
      if (l.autoregressive)
        view.sequential[l.inverted ? 0 : 1] = true;
      int64_t weights = 0;
      std::vector<int64_t> waves(l.wave_count);
      for (int64_t k = 0; k < l.step_count; ++k) {
        const ProgramStep &s = l.steps[k];
        weights += s.in * s.out, waves[s.wave] += s.in * s.out;
        view.panels = view.panels || s.panels;
      }
      view.reads_context = view.reads_context || l.reads_context;
      view.net_weights = std::max(view.net_weights, weights / std::max<int64_t>(l.chains, 1));
      for (int64_t wave : waves)
        view.wave_weights = std::max(view.wave_weights, wave);
    }
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

// The plans that were made so far.
class Plans {
public:
  static Plans &get() {
    static Plans *const plans = new Plans; // never destroyed: threads may outlive the rest
    return *plans;
  }

  std::shared_ptr<const Plan> find(const std::string &text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(text);
    return found == plans_.end() ? nullptr : found->second;
  }

  // The plan, or that of a thread that came first.
  std::shared_ptr<const Plan> keep(const std::string &text, std::shared_ptr<const Plan> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= 256) // a search over architectures must not fill the memory
      plans_.clear();
    return plans_.emplace(text, std::move(plan)).first->second;
  }

private:
  Plans() {
#if defined(__linux__)
    // A child of fork may ask while another thread of its parent was in here.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
  }

  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Plan>> plans_;
};

} // namespace

std::shared_ptr<const Plan> plan_of(const std::string &text) {
  // The last plan of a thread is at hand without a lock: a training step asks for the same one twice.
  thread_local std::string last_text;
  thread_local std::shared_ptr<const Plan> last;
  if (last != nullptr && text == last_text)
    return last;
  std::shared_ptr<const Plan> found = Plans::get().find(text);
  if (found == nullptr) {
    auto plan = std::make_shared<Plan>();
    Parser(text, *plan).parse();
    found = Plans::get().keep(text, std::move(plan));
  }
  last_text = text, last = std::move(found);
  return last;
}

} // namespace iin_fast
