// Stands in for the sm90 family in builds without sm_90; never called, for no row is selected
// there.
#include <stdexcept>

#include "sm90/launch.h"

namespace flash::sm90 {
namespace {

[[noreturn]]
void raise_absent() {
  throw std::runtime_error("flash_attn: this build holds no sm90 kernels");
}

}  // namespace

bool can_address(ForwardParams const&, DType) {
  return false;
}

std::size_t forward_workspace_bytes(Sm90ForwardConfig const&, ForwardParams const&) {
  raise_absent();
}

void forward(Sm90ForwardConfig const&, ForwardParams const&, Device const&, Stream) {
  raise_absent();
}

bool can_address(Sm90BackwardConfig const&, BackwardParams const&, Device const&) {
  return false;
}

int backward_section(Sm90BackwardConfig const&, Shape const&, Device const&) {
  raise_absent();
}

std::size_t backward_workspace_bytes(Sm90BackwardConfig const&, BackwardParams const&, int) {
  raise_absent();
}

void backward(Sm90BackwardConfig const&, BackwardParams const&, int, Device const&, Stream) {
  raise_absent();
}

int limit_section(int heads) {
  return heads;
}

}  // namespace flash::sm90
