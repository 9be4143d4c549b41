#include <atomic>
#include <mutex>
#include <unordered_map>

#include "device/launch.cuh"
#include "sm90/tile_counter.h"

namespace flash::sm90 {
namespace {

constexpr int kStreams = 1024;
constexpr int kCounters = 65536;
constexpr int kMaxDevices = 64;
constexpr int kNone = -1;

__device__ int2 counters[kCounters];

/// The next counter for a launch that is captured into a graph.
int graph_counter() {
  static std::atomic<int> next{kStreams};
  int const idx = next.load(std::memory_order_relaxed) < kCounters ? next.fetch_add(1) : kCounters;
  return idx < kCounters ? idx : kNone;
}

/// The counter of a stream, by its handle; on each device a memory of its own.
int stream_counter(void* stream) {
  thread_local void* last_stream = nullptr;
  thread_local int last_counter = 0;  // that of the default stream
  if (stream == last_stream) {
    return last_counter;
  }
  static std::mutex mutex;
  static std::unordered_map<void*, int> known = {{nullptr, 0}};
  std::lock_guard<std::mutex> const lock(mutex);
  auto found = known.find(stream);
  if (found == known.end()) {
    if (known.size() == kStreams) {
      return kNone;
    }
    found = known.emplace(stream, int(known.size())).first;
  }
  last_stream = stream;
  last_counter = found->second;
  return last_counter;
}

int2* counters_of(int device_index) {
  static std::atomic<int2*> cached[kMaxDevices];
  if (device_index >= kMaxDevices) {
    return nullptr;
  }
  int2* address = cached[device_index].load(std::memory_order_relaxed);
  if (address == nullptr) {
    void* symbol = nullptr;
    check_cuda(cudaGetSymbolAddress(&symbol, counters), "cudaGetSymbolAddress");
    address = static_cast<int2*>(symbol);
    cached[device_index].store(address, std::memory_order_relaxed);
  }
  return address;
}

}  // namespace

int* tile_counter(int device_index, void* stream) {
  // One handle that means another stream in every thread.
  if (stream == cudaStreamPerThread) {
    return nullptr;
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status),
             "cudaStreamIsCapturing");
  bool const is_captured = status != cudaStreamCaptureStatusNone;
  int const idx = is_captured ? graph_counter() : stream_counter(stream);
  int2* const all = counters_of(device_index);
  return idx == kNone || all == nullptr ? nullptr : &all[idx].x;
}

}  // namespace flash::sm90
