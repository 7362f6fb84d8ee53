// Which way the flow's map takes on a GPU: bounds between the ways, and the launches.
#pragma once

#include "flow/flow_cluster_kernels.cuh"
#include "flow/flow_nets_kernels.cuh"

namespace iin_fast {

// Bounds, from times of the published nets on an H100 (docs/performance.md, benchmarks/gpu.py). Clusters walk up to so
// many rounds, tiles of rows over clusters that run at once; behind them one launch for both nets of a half is faster,
// for nets and batches of at least these.
template <class Precision>
constexpr int cluster_rounds = std::is_same_v<Precision, Tf32x3> ? 5
                               : std::is_same_v<Precision, Tf32> ? 4
                                                                 : 3;
constexpr int nets_hidden = 256;
constexpr int64_t nets_rows = 512;

// Gives `walk` its way: before memory is arranged for it. A way that a test asks for and that does not fit becomes
// best.
template <class Precision, class Launch>
void choose_way(FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  if constexpr (std::is_same_v<Precision, Exact>) {
    walk.way = walk.way == FlowWay::layers ? FlowWay::layers : FlowWay::best;
  } else {
    const bool best = walk.way == FlowWay::best, in_nets = nets_fit(walk);
    const int64_t clusters =
        (best || walk.way == FlowWay::clusters) && clusters_fit(walk) ? clusters_at_once<Precision>(walk, launch) : 0;
    if (clusters > 0 && (!best || tiles_of(walk.sizes.batch, cluster_rows) <= cluster_rounds<Precision> * clusters))
      walk.way = FlowWay::clusters;
    else if (in_nets && (best ? walk.hidden() >= nets_hidden && walk.sizes.batch >= nets_rows &&
                                    launch.shared_room() >= nets_bytes<Precision, large_rows<Precision>>
                              : walk.way == FlowWay::nets))
      walk.way = FlowWay::nets;
    else if (walk.way != FlowWay::layers)
      walk.way = FlowWay::best;
  }
}

// The map, in the way that choose_way() gave.
template <class Precision, class Launch>
void launch_flow(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  if (walk.sizes.batch == 0)
    return;
  if constexpr (!std::is_same_v<Precision, Exact>) {
    if (walk.way == FlowWay::clusters)
      return launch_flow_clusters<Precision>(walk, launch);
    if (walk.way == FlowWay::nets)
      return launch_flow_nets<Precision>(walk, launch);
  }
  launch_flow_forward<Precision>(walk, launch);
}

} // namespace iin_fast
