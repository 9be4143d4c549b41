// The counters that persistent thread blocks draw their tiles from.
#pragma once

namespace flash::sm90 {

/// Two ints in the memory of the current device for a launch on `stream` (a cudaStream_t): next
/// tile and finished thread blocks, zero before and after every launch. Launches that may run at
/// the same time never share one: a stream has its own, and so has every launch that is captured
/// into a graph, for a graph may be replayed on any stream. Null if none is left (1024 streams,
/// 64512 captured launches a process) or the stream is one of several by the same handle; tiles are
/// then dealt out evenly.
int* tile_counter(int device_index, void* stream);

}  // namespace flash::sm90
