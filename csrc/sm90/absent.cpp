// Stands in for the sm90 family in builds without sm_90; never called, for no row is selected
// there.
#include <stdexcept>

#include "sm90/launch.h"

namespace flash::sm90 {

bool can_address(ForwardParams const&, DType) {
  return false;
}

void forward(Sm90ForwardConfig const&, ForwardParams const&, Device const&, Stream) {
  throw std::runtime_error("flash_attn: this build holds no sm90 kernels");
}

}  // namespace flash::sm90
