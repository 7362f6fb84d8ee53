#include "flow_program/flow_program_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "affine_coupling/affine_coupling.h"

namespace iin_fast {
namespace {

constexpr int64_t panel_bytes = 32 * 1024; // of a panel, at most, where 4 columns fit
constexpr int widest_panel = 128;

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

class Builder {
public:
  Builder(const ProgramView &program, int item) : program_(program), item_(item) {}

  Table build() {
    TableView &v = table_.view;
    v.dim = static_cast<int>(program_.dim), v.context = static_cast<int>(program_.context);
    v.layer_count = static_cast<int>(program_.layer_count), v.values = v.context;
    table_.fits = !program_.shared && program_.dim <= 4096;
    for (int64_t l = 0; l < program_.layer_count; ++l)
      layers_.push_back(layer(program_.layers[l]));
    v.panel = static_cast<int>(rounded(v.panel, 4)), v.accumulator = rounded(v.accumulator, 4);
    list(list_forward, false, false, false), list(list_inverse, true, false, false);
    for (int i = 0; i < 4; ++i)
      list(list_backward + i, i % 2 == 1, true, i >= 2);
    v.layers = append(layers_), v.steps = append(steps_), v.panels = append(panels_), v.indices = append(indices_);
    return std::move(table_);
  }

private:
  template <class Part> int64_t append(const std::vector<Part> &parts) {
    std::vector<unsigned char> &bytes = table_.bytes;
    bytes.resize(rounded(bytes.size(), 16));
    const int64_t at = bytes.size();
    bytes.resize(at + parts.size() * sizeof(Part));
    if (!parts.empty())
      std::memcpy(bytes.data() + at, parts.data(), parts.size() * sizeof(Part));
    return at;
  }

  int64_t pack(int64_t count) {
    const int64_t at = table_.packed;
    table_.packed += rounded(count, 4);
    return at;
  }
  int64_t accumulate(int64_t count) {
    const int64_t at = table_.view.accumulator;
    table_.view.accumulator += rounded(count, 4);
    return at;
  }
  int keep(const int64_t *index, int64_t count) {
    const int at = static_cast<int>(indices_.size());
    indices_.insert(indices_.end(), index, index + count);
    return at;
  }

  TableMatrix matrix(int64_t in, int64_t out) {
    const int64_t most = std::min<int64_t>(widest_panel, std::max<int64_t>(panel_bytes / (in * item_) / 4 * 4, 4));
    TableMatrix m{};
    m.in = static_cast<int>(in), m.out = static_cast<int>(out);
    m.panels = static_cast<int>((out + most - 1) / most);
    m.width = static_cast<int>(rounded((out + m.panels - 1) / m.panels, 4));
    m.at = pack(int64_t(m.panels) * m.width * in);
    table_.view.panel = std::max(table_.view.panel, m.width * m.in);
    return m;
  }

  TablePart &part(TablePart::Kind kind, const ProgramLayer &layer) {
    table_.parts.push_back({});
    TablePart &p = table_.parts.back();
    p.kind = kind, p.inverted = layer.inverted;
    return p;
  }

  TableLayer layer(const ProgramLayer &l) {
    const int64_t dim = program_.dim;
    TableLayer t{};
    t.kind = static_cast<int>(l.kind), t.inverted = l.inverted, t.autoregressive = l.autoregressive;
    t.order = static_cast<int>(l.order), t.exact = l.exact;
    t.slope = l.slope, t.log_slope = std::log(l.slope);
    t.first_step = static_cast<int>(steps_.size());
    switch (l.kind) {
    case LayerKind::affine: {
      TablePart &p = part(TablePart::affine, l);
      p.form = static_cast<int>(l.form), p.eps = l.eps, p.a = l.shift, p.b = l.scale;
      p.out = static_cast<int>(dim);
      p.packed = t.packed = pack(2 * dim + 1), p.gradient = t.gradient = accumulate(2 * dim + 1);
      break;
    }
    case LayerKind::permute:
      t.index = -1;
      if (l.index != nullptr) {
        t.index = keep(l.index, dim);
      } else {
        TablePart &p = part(TablePart::index, l);
        p.a = l.index_at, p.out = static_cast<int>(dim);
        p.packed = t.packed = pack(dim * 8 / item_);
      }
      break;
    case LayerKind::linear: {
      TablePart &p = part(TablePart::linear, l);
      p.form = static_cast<int>(l.form), p.eps = l.eps, p.storage = static_cast<int>(l.storage);
      p.a = l.lower, p.b = l.upper, p.c = l.scale, p.d = l.shift;
      p.out = static_cast<int>(dim);
      p.packed = t.packed = pack(2 * dim * dim + dim + 1);
      p.gradient = t.gradient = accumulate(2 * dim * dim + dim + 1);
      break;
    }
    case LayerKind::activation:
      break;
    case LayerKind::coupling:
      coupling(l, t);
    }
    return t;
  }

  int row(const ProgramLayer &l, int64_t id) const {
    return id == 1 ? 0 : static_cast<int>(program_.context + l.values[id].at);
  }
  int row_count(const ProgramLayer &l, int64_t id) const {
    return static_cast<int>(id == 1 ? program_.context : l.values[id].rows);
  }

  void coupling(const ProgramLayer &l, TableLayer &t) {
    const int context = static_cast<int>(program_.context);
    t.index = keep(l.index, l.index_count), t.index_count = static_cast<int>(l.index_count);
    t.transformed = keep(l.transformed, l.transformed_count);
    t.transformed_count = static_cast<int>(l.transformed_count);
    t.passed = keep(l.passed, l.passed_count), t.passed_count = static_cast<int>(l.passed_count);
    t.step_count = static_cast<int>(l.step_count);
    t.input = row(l, 0), t.output = context + static_cast<int>(l.output_at);
    t.raw = context + static_cast<int>(l.raw_at), t.raw_rows = static_cast<int>(l.raw_rows);
    t.transformer = static_cast<int>(l.transformer);
    int rows = context + static_cast<int>(l.net_rows);
    if (l.transformer == TransformerKind::spline) {
      const SplineTransformer &s = l.spline;
      t.spline = {static_cast<int>(s.bins), static_cast<int>(s.count), static_cast<int>(s.tails),
                  static_cast<int>(s.form), s.limits};
      t.gain = s.gain, t.wrap = s.wrap;
      if (l.reread && t.raw == t.output) // the walk keeps exponentials in the place of raw values
        t.raw = rows, rows += t.raw_rows;
    } else {
      const AffineTransformer &a = l.affine;
      t.affine = {static_cast<int>(a.squash),   static_cast<int>(a.scale_at),   static_cast<int>(a.scale_step),
                  static_cast<int>(a.shift_at), static_cast<int>(a.shift_step), a.clamp};
      t.gain = a.gain;
      std::set<int64_t> read; // threads add to the gradients of raw values: each is of one feature
      for (int64_t i = 0; i < l.transformed_count; ++i) {
        table_.fits = table_.fits && read.insert(a.shift_at + i * a.shift_step).second;
        if (a.scale_at >= 0)
          table_.fits = table_.fits && read.insert(a.scale_at + i * a.scale_step).second;
      }
    }
    table_.view.values = std::max(table_.view.values, rows);
    if (l.autoregressive) {
      t.orders = table_.view.orders;
      table_.view.orders += static_cast<int>(program_.dim) + rows;
    }
    steps(l, t);
  }

  void steps(const ProgramLayer &l, TableLayer &t) {
    for (int64_t k = 0; k < l.step_count; ++k) {
      const ProgramStep &s = l.steps[k];
      TableStep made{};
      made.kind = static_cast<int>(s.kind), made.activation = static_cast<int>(s.activation), made.slope = s.slope;
      made.a = row(l, s.a), made.b = row(l, s.b), made.out = row(l, 2 + k);
      made.a_rows = row_count(l, s.a), made.rows = row_count(l, 2 + k);
      made.bias = -1;
      if (s.kind == StepKind::context)
        made.a = static_cast<int>(s.first);
      if (s.kind == StepKind::dense) {
        made.forward = matrix(s.in, s.out), made.backward = matrix(s.out, s.in);
        TablePart &p = part(TablePart::dense, l);
        p.panels = s.panels, p.a = s.weight, p.b = s.mask, p.c = s.bias;
        p.in = static_cast<int>(s.in), p.out = static_cast<int>(s.out);
        p.forward = made.forward, p.backward = made.backward;
        p.gradient = made.weight_gradient = accumulate(s.in * s.out + s.out);
        made.bias_gradient = made.weight_gradient + s.in * s.out;
        if (s.bias.present())
          p.packed = made.bias = pack(s.out);
      } else if (s.kind == StepKind::act && s.a == 1 + k && made.a == made.out &&
                 l.steps[k - 1].kind == StepKind::dense) {
        made.skip = 1;
        steps_.back().fused = made.activation, steps_.back().slope = s.slope;
      }
      steps_.push_back(made);
    }
    // which values have a gradient when a step adds to it, from the last step to the first
    std::vector<bool> seen(2 + l.step_count);
    seen[1] = true; // the context has gradients of other layers
    for (int64_t k = 0; k < l.step_count; ++k) {
      const int64_t at = l.values[2 + k].at; // outputs come with theirs
      seen[2 + k] = at >= l.output_at && at < l.output_at + l.raw_rows;
    }
    const auto look = [&](int64_t id) {
      const bool before = seen[id];
      seen[id] = true;
      return before;
    };
    for (int64_t k = l.step_count - 1; k >= 0; --k) {
      const ProgramStep &s = l.steps[k];
      TableStep &made = steps_[t.first_step + k];
      made.unread = !look(2 + k);
      made.add_a = look(s.a);
      if (s.kind == StepKind::add || s.kind == StepKind::glu || s.kind == StepKind::concat)
        made.add_b = look(s.b);
    }
    t.input_has_gradient = seen[0];
  }

  void add_panels(const TableMatrix &m) {
    for (int p = 0; p < m.panels; ++p)
      panels_.push_back({m.at + int64_t(p) * m.width * m.in, int64_t(m.width) * m.in});
  }

  // The panels of a walk over all layers, as TileWalk takes them.
  void list(int number, bool inverse, bool backward, bool context_grad) {
    TableList &list = table_.view.lists[number];
    list.first = static_cast<int>(panels_.size());
    const int count = table_.view.layer_count;
    for (int position = 0; position < count; ++position) {
      const TableLayer &l = layers_[inverse != backward ? count - 1 - position : position];
      if (static_cast<LayerKind>(l.kind) != LayerKind::coupling ||
          (l.autoregressive && (l.inverted != 0) != inverse)) // that one reads weights where they are
        continue;
      for (int k = 0; k < l.step_count; ++k)
        if (const TableStep &s = steps_[l.first_step + k]; static_cast<StepKind>(s.kind) == StepKind::dense)
          add_panels(s.forward);
      for (int k = l.step_count - 1; k >= 0 && backward; --k)
        if (const TableStep &s = steps_[l.first_step + k];
            static_cast<StepKind>(s.kind) == StepKind::dense && (s.a >= table_.view.context || context_grad))
          add_panels(s.backward);
    }
    list.count = static_cast<int>(panels_.size()) - list.first;
  }

  const ProgramView &program_;
  const int item_;
  Table table_;
  std::vector<TableLayer> layers_;
  std::vector<TableStep> steps_;
  std::vector<TablePanel> panels_;
  std::vector<int> indices_;
};

} // namespace

Table table_of(const ProgramView &program, int item) { return Builder(program, item).build(); }

} // namespace iin_fast
