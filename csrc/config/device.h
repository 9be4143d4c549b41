// What launches need to know of a device.
#pragma once

#include <cstdint>

namespace flash {

/// Opaque cudaStream_t.
using Stream = void*;

/// Queried once and kept by the caller.
struct Device {
  int index;
  int num_sms;
  int64_t l2_bytes;
};

}  // namespace flash
