#include "sm90/forward_launch.cuh"

template struct flash::sm90::ForwardUnit<128>;
