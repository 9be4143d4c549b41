// Threads of one call. A call is a short list of phases, each a number of independent tasks that
// threads claim in order; a phase starts when every task of the one before is done. Threads live as
// long as the call, so the library neither owns a pool nor links an OpenMP runtime beside torch's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

namespace flash::cpu {

struct Phase {
  int num_tasks;
  /// Must not throw: scratch is allocated before the first phase. thread < num_threads.
  std::function<void(int task, int thread)> run;
};

/// Runs the phases on the calling thread and up to num_threads - 1 more; fewer if the system has no
/// more to give. Tasks of a phase start in the order of their index.
void run_phases(int num_threads, std::span<Phase const> phases);

/// Threads that pay for themselves: no more than tasks, nor than the work is worth.
int useful_threads(int num_threads, int64_t num_tasks, int64_t multiply_adds);

/// Cache-line aligned, uninitialised floats: the thread that first writes a page owns it.
struct AlignedFree {
  void operator()(float* memory) const;
};
using FloatBuffer = std::unique_ptr<float[], AlignedFree>;
FloatBuffer allocate_floats(int64_t count);

}  // namespace flash::cpu
