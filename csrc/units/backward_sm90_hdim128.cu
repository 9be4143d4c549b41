#include "sm90/backward_launch.cuh"

template struct flash::sm90::BackwardUnit<128>;
