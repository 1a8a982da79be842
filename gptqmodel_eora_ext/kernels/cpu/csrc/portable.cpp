#include "linear.h"
#include "vec_portable.h"
#include "kernels.inl"

const Kernels* portable_kernels() { return &table; }
