// From the text of a program to the arrays that the loops walk.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "flow_program/flow_program.h"

namespace iin_fast {

// One tensor read: which elements of which parameter.
struct ParameterUse {
  ParameterRef ref;
  int64_t count;
  enum Kind { value, mask, index } kind; // in the dtype of x; that or bool; int64
  int64_t layer;
};

// A parsed program. It owns what its view points to.
struct Plan {
  ProgramView view;
  std::vector<ProgramLayer> layers;
  std::vector<std::vector<int64_t>> indices;
  std::vector<std::vector<ProgramStep>> steps;
  std::vector<std::vector<ProgramValue>> values;
  std::vector<std::vector<ProgramWave>> waves;
  std::vector<ParameterUse> uses;
  std::vector<int64_t> needed; // elements that each tensor must have at least
  std::vector<int64_t> read;   // elements of each tensor that layers read
};

// The plan of a text, parsed once and kept. Throws what STD_TORCH_CHECK throws, naming the layer.
std::shared_ptr<const Plan> plan_of(const std::string &text);

} // namespace iin_fast
