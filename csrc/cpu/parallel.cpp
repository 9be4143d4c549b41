#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace flash::cpu {
namespace {

constexpr std::align_val_t kCacheLine{64};

/// Starting a thread costs about as much as this many multiply-adds on one core.
constexpr int64_t kWorkPerThread = 1 << 20;

struct PhaseState {
  std::atomic<int> next{0};
  std::atomic<int> done{0};
};

void run_thread(int thread, std::span<Phase const> phases, PhaseState* states) {
  for (size_t idx = 0; idx < phases.size(); ++idx) {
    Phase const& phase = phases[idx];
    PhaseState& state = states[idx];
    for (int task; (task = state.next.fetch_add(1)) < phase.num_tasks;) {
      phase.run(task, thread);
      if (state.done.fetch_add(1) + 1 == phase.num_tasks) {
        state.done.notify_all();
      }
    }
    for (int done; (done = state.done.load()) < phase.num_tasks;) {
      state.done.wait(done);
    }
  }
}

}  // namespace

void run_phases(int num_threads, std::span<Phase const> phases) {
  auto const states = std::make_unique<PhaseState[]>(phases.size());
  std::vector<std::thread> helpers;
  helpers.reserve(std::max(num_threads - 1, 0));
  for (int thread = 1; thread < num_threads; ++thread) {
    try {
      helpers.emplace_back(run_thread, thread, phases, states.get());
    } catch (std::system_error const&) {
      break;
    } catch (std::bad_alloc const&) {
      break;
    }
  }
  run_thread(0, phases, states.get());
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

int useful_threads(int num_threads, int64_t num_tasks, int64_t multiply_adds) {
  int64_t const limit = std::min(num_tasks, 1 + multiply_adds / kWorkPerThread);
  return int(std::clamp<int64_t>(limit, 1, std::max(num_threads, 1)));
}

void AlignedFree::operator()(float* memory) const {
  ::operator delete[](memory, kCacheLine);
}

FloatBuffer allocate_floats(int64_t count) {
  return FloatBuffer(static_cast<float*>(::operator new[](sizeof(float) * count, kCacheLine)));
}

}  // namespace flash::cpu
