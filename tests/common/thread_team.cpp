// csrc/common/thread_team.h under ThreadSanitizer: many short steps, threads that come late or never.
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "common/thread_team.h"

int main() {
  constexpr int64_t count = 37;
  std::vector<int64_t> sums(count, 0);
  for (int call = 0; call < 20; ++call) {
    iin_fast::ThreadTeam team;
    std::vector<std::thread> workers;
    for (int t = 0; t < 3; ++t)
      workers.emplace_back([&team, t] {
        std::this_thread::sleep_for(std::chrono::microseconds(t * 500)); // the later ones join in the middle
        team.work();
      });
    team.start();
    for (int64_t step = 0; step < 500; ++step) {
      auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          sums[i] += step;
      };
      team.run(count, [](int64_t b, int64_t e, void *f) { (*static_cast<decltype(body) *>(f))(b, e); }, &body);
    }
    team.close();
    for (std::thread &worker : workers)
      worker.join();
  }
  iin_fast::ThreadTeam serial; // a pool that runs a worker's piece first: it must return, not wait
  serial.work();
  bool right = true;
  for (const int64_t sum : sums)
    right = right && sum == 20 * (499 * 500 / 2);
  std::printf(right ? "right" : "wrong");
}
