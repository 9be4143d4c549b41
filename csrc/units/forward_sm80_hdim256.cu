#include "sm80/forward_launch.cuh"

template struct flash::sm80::ForwardUnit<256, 2>;
