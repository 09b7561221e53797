#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own AVX-512 intrinsics
#include "rows.inc"

const gspo::InstructionSet gspo::kAvx512 = instruction_set("avx512");
