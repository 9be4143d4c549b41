#include "sm80/backward_launch.cuh"

template struct flash::sm80::BackwardUnit<96, 2>;
