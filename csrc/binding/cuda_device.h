// Facts of a CUDA device and the kernels its problems run on, found out once per device.
#pragma once

#include <array>

#include "config/device.h"
#include "config/select.h"

namespace flash::binding {

/// head_dims that the CUDA kernels take are multiples of this: 16-byte rows.
inline constexpr int kHeadDimStep = 8;

class CudaDevice {
 public:
  /// Throws if this build has no machine code for the device.
  explicit CudaDevice(int device_index);

  /// The row of the sm80 family for the problem. Throws with one reason per row if none serves it.
  ForwardConfig const& forward_config(DType dtype, ForwardParams const& params) const;
  BackwardConfig const& backward_config(DType dtype, BackwardParams const& params) const;

  /// The row of the sm90 family for the problem; null where the sm80 family has to serve it.
  Sm90ForwardConfig const* sm90_forward_config(DType dtype, ForwardParams const& params) const;
  Sm90BackwardConfig const* sm90_backward_config(DType dtype, BackwardParams const& params) const;

  Device const& properties() const { return properties_; }

 private:
  /// Selections by extras, dtype and head_dim / kHeadDimStep: a lookup in the hot path
  /// instead of a search.
  template <class Config>
  using Table = std::array<std::array<std::array<Selection<Config>, 256 / kHeadDimStep + 1>, 3>, 2>;

  /// False also where limit_kernel_family() says so.
  bool uses_sm90() const;

  template <class Config, class Params>
  Config const& find(Table<Config> const& table, char const* pass, DType dtype,
                     Params const& params) const;

  int compute_capability_;
  int smem_bytes_;  // that a thread block may use
  bool has_sm90_;   // this build's machine code for the device has the sm90 family
  Device properties_;
  Table<ForwardConfig> forward_;
  Table<BackwardConfig> backward_;
};

/// Thread-safe; made at the first call for a device.
CudaDevice const& cuda_device(int device_index);

/// torch's current stream on the device.
Stream current_stream(int device_index);

/// From now on no kernel family for GPUs newer than `arch` (80 or 90) serves a call: for tests and
/// benchmarks of the older families. Returns what was set before; 90 is where it starts.
int64_t limit_kernel_family(int64_t arch);

}  // namespace flash::binding
