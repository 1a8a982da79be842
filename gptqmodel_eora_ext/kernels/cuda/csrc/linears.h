// What a launch is told: shared by the kernels, the entry points and, field by field, ../linear.py.
#pragma once
#include <cstdint>

namespace eora {

// Modules of one launch: enough for q, k and v, or gate and up.
constexpr int MOST_MODULES = 4;
// How 16-bit numbers and factors are stored.
enum Kind : int32_t { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2, CODES8 = 8, CODES4 = 4 };
// Features that share a scale of a packed factor (formats/factors.py).
constexpr int FACTOR_GROUP = 64;

struct Module {
    const uint32_t* qweight;   // words × columns
    const uint32_t* qzeros;    // groups × words of columns, version 2; null where every zero is the middle code
    const uint16_t* scales;    // groups × columns, float16 or bfloat16
    const void* bias;          // columns; null for none
    const void* up;            // rank × columns, or its codes; null without an adapter
    const uint16_t* up_scales; // of packed factors, float16
    int32_t columns;
    int32_t rank;
    int32_t first_rank;  // where its components begin among those of all modules
    int32_t first_tile;  // likewise its tiles of outputs
};

struct Linears {
    Module modules[MOST_MODULES];
    const void* down;            // A of all modules, components × in_features, or its codes
    const uint16_t* down_scales;
    const int32_t* member_of;    // the member of an ensemble that each component belongs to; null without members
    int32_t module_count;
    int32_t components;          // of all modules together
    int32_t in_features;
    int32_t group_size;          // in_features for one group
    int32_t scale_kind;
    int32_t bias_kind;
    int32_t factor_kind;
    int32_t members;
};

// What changes from call to call.
struct Call {
    const uint16_t* x;      // rows × in_features
    uint16_t* ys[MOST_MODULES];
    const float* weights;   // rows × members; null weighs all components by 1
    float* parts;           // x Aᵀ in parts
    int32_t* counters;      // zero before and after every launch
    int32_t rows;
};

}  // namespace eora
