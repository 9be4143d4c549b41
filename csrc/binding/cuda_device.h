// Facts of a CUDA device and the kernels its problems run on, found out once per device.
#pragma once

#include <array>

#include "config/select.h"
#include "sm80/launch.h"

namespace flash::binding {

/// head_dims that the CUDA kernels take are multiples of this: 16-byte rows.
inline constexpr int kHeadDimStep = 8;

class CudaDevice {
 public:
  /// Throws if this build has no machine code for the device.
  explicit CudaDevice(int device_index);

  /// The row that serves the dtype and head_dims. Throws with one reason per row if none does.
  ForwardConfig const& forward_config(DType dtype, Shape const& shape) const;
  BackwardConfig const& backward_config(DType dtype, Shape const& shape) const;

  sm80::Device const& properties() const { return properties_; }

 private:
  /// Selections by dtype (fp16, bf16) and head_dim / kHeadDimStep: a lookup in the hot path instead
  /// of a search.
  template <class Config>
  using Table = std::array<std::array<Selection<Config>, 256 / kHeadDimStep + 1>, 2>;

  template <class Config>
  Config const& find(Table<Config> const& table, char const* pass, DType dtype,
                     Shape const& shape) const;

  int compute_capability_;
  sm80::Device properties_;
  Table<ForwardConfig> forward_;
  Table<BackwardConfig> backward_;
};

/// Thread-safe; made at the first call for a device.
CudaDevice const& cuda_device(int device_index);

/// torch's current stream on the device.
sm80::Stream current_stream(int device_index);

}  // namespace flash::binding
