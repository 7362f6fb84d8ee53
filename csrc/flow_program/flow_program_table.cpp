#include "flow_program/flow_program_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "affine_coupling/affine_coupling.h"

namespace iin_fast {
namespace {

constexpr int64_t most_elements = int64_t(1) << 30; // offsets are of 32 bits
constexpr int64_t panel_bytes = 32 * 1024;          // of a panel, at most, where 4 columns fit
constexpr int widest_panel = 128;

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Rows that are in use from one moment to another, both included, each in the first gap.
class Rows {
public:
  explicit Rows(int first) : first_(first), size(first) {}

  int take(int count, int64_t begin, int64_t end) {
    int at = first_;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Span &s : spans_)
        if (begin <= s.end && s.begin <= end && at < s.at + s.count && s.at < at + count)
          at = s.at + s.count, moved = true;
    }
    spans_.push_back({at, count, begin, end});
    size = std::max(size, at + count);
    return at;
  }

private:
  struct Span {
    int at, count;
    int64_t begin, end;
  };
  int first_;
  std::vector<Span> spans_;

public:
  int size; // of all
};

class Builder {
public:
  Builder(const ProgramView &program, int item, bool tape, bool tensor)
      : program_(program), item_(item), tape_(tape), tensor_(tensor) {}

  Table build() {
    TableView &v = table_.view;
    v.dim = static_cast<int>(program_.dim), v.context = static_cast<int>(program_.context);
    v.layer_count = static_cast<int>(program_.layer_count), v.values = v.gradients = v.context;
    table_.fits = !program_.shared && program_.dim <= 4096;
    std::vector<TableRecord> records;
    std::vector<unsigned char> layers;
    for (int64_t l = 0; l < program_.layer_count; ++l) {
      steps_.clear(), indices_.clear();
      TableLayer made = layer(program_.layers[l]);
      made.indices = static_cast<int>(sizeof(TableLayer) + steps_.size() * sizeof(TableStep));
      const size_t begin = layers.size();
      append(layers, &made, sizeof(TableLayer));
      append(layers, steps_.data(), steps_.size() * sizeof(TableStep));
      append(layers, indices_.data(), indices_.size() * sizeof(int));
      layers.resize(rounded(layers.size(), 16));
      records.push_back({static_cast<int>(begin), static_cast<int>(layers.size() - begin)});
      v.record = std::max(v.record, records.back().size);
      layers_.push_back(made), all_steps_.push_back(steps_);
      for (const bool inverse : {false, true})
        table_.sequential[inverse] = table_.sequential[inverse] || sequential(made, inverse);
    }
    v.panel = static_cast<int>(rounded(v.panel, 4));
    table_.fits = table_.fits && table_.packed < most_elements && accumulator_ < most_elements;
    v.accumulator = static_cast<int>(rounded(accumulator_, 4));
    list(list_forward, false, false, false), list(list_inverse, true, false, false);
    for (int i = 0; i < 4; ++i)
      list(list_backward + i, i % 2 == 1, true, i >= 2);
    table_.bytes = std::move(layers);
    v.records = static_cast<int>(table_.bytes.size());
    append(table_.bytes, records.data(), records.size() * sizeof(TableRecord));
    v.panels = static_cast<int>(table_.bytes.size());
    append(table_.bytes, panels_.data(), panels_.size() * sizeof(TablePanel));
    return std::move(table_);
  }

private:
  static void append(std::vector<unsigned char> &to, const void *from, size_t bytes) {
    const auto *const first = static_cast<const unsigned char *>(from);
    if (bytes > 0)
      to.insert(to.end(), first, first + bytes);
  }

  int pack(int64_t count) {
    const int at = static_cast<int>(table_.packed);
    table_.packed = std::min(table_.packed + rounded(count, 4), most_elements);
    return at;
  }
  int accumulate(int64_t count) {
    const int at = static_cast<int>(accumulator_);
    accumulator_ = std::min(accumulator_ + rounded(count, 4), most_elements);
    return at;
  }
  int keep(const int64_t *index, int64_t count) {
    const int at = static_cast<int>(indices_.size());
    indices_.insert(indices_.end(), index, index + count);
    return at;
  }

  TableMatrix matrix(int64_t in, int64_t out, bool bias) {
    const int64_t rows = in + bias;
    const int64_t by = tensor_ ? 16 : 4, apart = tensor_ ? 4 : 0;
    const int64_t room = (panel_bytes / (rows * item_) - apart) / by * by; // columns
    const int64_t most = std::min<int64_t>(widest_panel, std::max<int64_t>(room, by));
    TableMatrix m{};
    m.in = static_cast<int>(in), m.out = static_cast<int>(out), m.bias = bias;
    m.panels = static_cast<int>((out + most - 1) / most);
    m.width = static_cast<int>(rounded((out + m.panels - 1) / m.panels, by));
    m.stride = static_cast<int>(m.width + apart);
    m.at = pack(int64_t(m.panels) * m.stride * rows);
    table_.view.panel = std::max<int>(table_.view.panel, static_cast<int>(m.stride * rows));
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

  static bool sequential(const TableLayer &l, bool inverse) { return l.autoregressive && (l.inverted != 0) != inverse; }

  int row_count(const ProgramLayer &l, int64_t id) const {
    return static_cast<int>(id == 1 ? program_.context : l.values[id].rows);
  }

  void coupling(const ProgramLayer &l, TableLayer &t) {
    t.index = keep(l.index, l.index_count), t.index_count = static_cast<int>(l.index_count);
    t.transformed = keep(l.transformed, l.transformed_count);
    t.transformed_count = static_cast<int>(l.transformed_count);
    t.passed = keep(l.passed, l.passed_count), t.passed_count = static_cast<int>(l.passed_count);
    t.step_count = static_cast<int>(l.step_count), t.raw_rows = static_cast<int>(l.raw_rows);
    t.transformer = static_cast<int>(l.transformer);
    t.gain = l.transformer == TransformerKind::spline ? l.spline.gain : l.affine.gain;
    if (l.transformer == TransformerKind::spline) {
      const SplineTransformer &s = l.spline;
      t.spline = {static_cast<int>(s.bins), static_cast<int>(s.count), static_cast<int>(s.tails),
                  static_cast<int>(s.form), s.limits};
      t.wrap = s.wrap;
    } else {
      const AffineTransformer &a = l.affine;
      t.affine = {static_cast<int>(a.squash),   static_cast<int>(a.scale_at),   static_cast<int>(a.scale_step),
                  static_cast<int>(a.shift_at), static_cast<int>(a.shift_step), a.clamp};
      std::set<int64_t> read; // threads add to the gradients of raw values: each is of one feature
      for (int64_t i = 0; i < l.transformed_count; ++i) {
        table_.fits = table_.fits && read.insert(a.shift_at + i * a.shift_step).second;
        if (a.scale_at >= 0)
          table_.fits = table_.fits && read.insert(a.scale_at + i * a.scale_step).second;
      }
    }
    place(l, t);
    if (l.autoregressive) {
      t.orders = table_.view.orders;
      table_.view.orders += static_cast<int>(program_.dim) + table_.view.values;
    }
    steps(l, t);
  }

  bool is_output(const ProgramLayer &l, int64_t id) const {
    return id >= 2 && l.values[id].at >= l.output_at && l.values[id].at < l.output_at + l.raw_rows;
  }

  // Where the values of a net and their gradients lie. Step k is moment k forward, count - 1 - k backward; inputs are
  // there before, outputs stay. An activation in the place of its source has the rows of that.
  void place(const ProgramLayer &l, TableLayer &t) {
    const int64_t count = l.step_count;
    const int context = static_cast<int>(program_.context), outputs = static_cast<int>(l.raw_rows);
    const bool all = tape_ || l.autoregressive; // every value stays
    const auto in_place = [&](int64_t k) {
      return l.steps[k].kind == StepKind::act && l.steps[k].a >= 2 && l.values[2 + k].at == l.values[l.steps[k].a].at;
    };
    std::vector<int64_t> root(2 + count), last(2 + count, -1); // last: step that reads a value
    for (int64_t k = 0; k < count; ++k) {
      const ProgramStep &s = l.steps[k];
      root[2 + k] = in_place(k) ? root[s.a] : 2 + k;
      last[s.a] = k, last[2 + k] = k;
      if (two_sources(s))
        last[s.b] = k;
    }
    root[0] = 0, root[1] = 1;
    std::vector<int64_t> end(2 + count, -1); // of the values that share rows
    for (int64_t id = 0; id < 2 + count; ++id)
      end[root[id]] = std::max(end[root[id]], last[id]);
    rows_.assign(2 + count, 0), gradients_.assign(2 + count, 0);
    Rows values(context), gradients(context);
    int64_t first_output = count;
    for (int64_t k = count - 1; k >= 0; --k)
      if (is_output(l, 2 + k))
        first_output = k;
    t.output = values.take(outputs, all ? -1 : first_output, count);
    // the transformer keeps exponentials in the place of raw values, so those that are read again are copied
    const bool copied = l.raw_at != l.output_at || (l.reread && l.transformer == TransformerKind::spline);
    t.raw = copied ? values.take(outputs, all ? -1 : count, count) : t.output;
    t.output_gradient = gradients.take(outputs, -1, count - 1 - first_output);
    t.raw_gradient = copied ? gradients.take(outputs, -1, -1) : t.output_gradient;
    for (int64_t id = 0; id < 2 + count; ++id) {
      if (id == 1)
        continue;
      if (is_output(l, id)) {
        const int within = static_cast<int>(l.values[id].at - l.output_at);
        rows_[id] = t.output + within, gradients_[id] = t.output_gradient + within;
      } else if (root[id] != id) {
        rows_[id] = rows_[root[id]], gradients_[id] = gradients_[root[id]];
      } else {
        const int64_t made = id == 0 ? -1 : id - 2;
        rows_[id] = values.take(row_count(l, id), all ? -1 : made, all ? count : end[id]);
        gradients_[id] = gradients.take(row_count(l, id), count - 1 - std::max<int64_t>(end[id], 0), count - 1 - made);
      }
    }
    t.input = rows_[0], t.input_gradient = gradients_[0];
    table_.view.values = std::max(table_.view.values, values.size);
    table_.view.gradients = std::max(table_.view.gradients, gradients.size);
  }

  static bool two_sources(const ProgramStep &s) {
    return s.kind == StepKind::add || s.kind == StepKind::glu || s.kind == StepKind::concat;
  }

  void steps(const ProgramLayer &l, TableLayer &t) {
    for (int64_t k = 0; k < l.step_count; ++k) {
      const ProgramStep &s = l.steps[k];
      TableStep made{};
      made.kind = static_cast<int>(s.kind), made.activation = static_cast<int>(s.activation), made.slope = s.slope;
      made.a = rows_[s.a], made.b = rows_[s.b], made.out = rows_[2 + k];
      made.da = gradients_[s.a], made.db = gradients_[s.b], made.dout = gradients_[2 + k];
      made.a_rows = row_count(l, s.a), made.rows = row_count(l, 2 + k);
      if (s.kind == StepKind::context)
        made.a = made.da = static_cast<int>(s.first);
      if (s.kind == StepKind::dense) {
        made.forward = matrix(s.in, s.out, s.bias.present()), made.backward = matrix(s.out, s.in, false);
        TablePart &p = part(TablePart::dense, l);
        p.panels = s.panels, p.a = s.weight, p.b = s.mask, p.c = s.bias;
        p.in = static_cast<int>(s.in), p.out = static_cast<int>(s.out);
        p.forward = made.forward, p.backward = made.backward;
        p.gradient = made.weight_gradient = accumulate(s.in * s.out + s.out);
        if (l.transformer == TransformerKind::spline && t.gain != 1 && t.raw == t.output && is_output(l, 2 + k) &&
            s.out == l.raw_rows) { // the weight takes the gain along
          p.gain = t.gain, p.gain_rows = 2 * t.spline.bins, p.gain_count = t.spline.count;
          t.gain = 1;
        }
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
    for (int64_t k = 0; k < l.step_count; ++k)
      seen[2 + k] = is_output(l, 2 + k); // these come with theirs
    const auto look = [&](int64_t id) {
      const bool before = seen[id];
      seen[id] = true;
      return before;
    };
    for (int64_t k = l.step_count - 1; k >= 0; --k) {
      const ProgramStep &s = l.steps[k];
      TableStep &made = steps_[k];
      made.unread = !look(2 + k);
      made.add_a = look(s.a);
      if (two_sources(s))
        made.add_b = look(s.b);
    }
    t.input_has_gradient = seen[0];
  }

  void add_panels(const TableMatrix &m) {
    const int size = m.stride * (m.in + m.bias);
    for (int p = 0; p < m.panels; ++p)
      panels_.push_back({m.at + p * size, size});
  }

  // The panels of a walk over all layers, as TileWalk takes them.
  void list(int number, bool inverse, bool backward, bool context_grad) {
    if (backward != tape_)
      return;
    TableList &list = table_.view.lists[number];
    list.first = static_cast<int>(panels_.size());
    const int count = table_.view.layer_count;
    for (int position = 0; position < count; ++position) {
      const int place = inverse != backward ? count - 1 - position : position;
      const TableLayer &l = layers_[place];
      const std::vector<TableStep> &steps = all_steps_[place];
      if (sequential(l, inverse)) // that one reads weights where they are
        continue;
      for (const TableStep &s : steps)
        if (static_cast<StepKind>(s.kind) == StepKind::dense)
          add_panels(s.forward);
      for (int k = static_cast<int>(steps.size()) - 1; k >= 0 && backward; --k)
        if (static_cast<StepKind>(steps[k].kind) == StepKind::dense &&
            (steps[k].a >= table_.view.context || context_grad))
          add_panels(steps[k].backward);
    }
    list.count = static_cast<int>(panels_.size()) - list.first;
    table_.view.list = std::max(table_.view.list, list.count);
  }

  const ProgramView &program_;
  const int item_;
  const bool tape_, tensor_;
  Table table_;
  int64_t accumulator_ = 0;
  std::vector<TableLayer> layers_;
  std::vector<std::vector<TableStep>> all_steps_;
  std::vector<TablePanel> panels_;
  // of the layer at hand
  std::vector<TableStep> steps_;
  std::vector<int> indices_, rows_, gradients_;
};

} // namespace

Table table_of(const ProgramView &program, int item, bool tape, bool tensor) {
  return Builder(program, item, tape, tensor).build();
}

} // namespace iin_fast
