#include "rows.inc"

const gspo::InstructionSet gspo::kAvx512 = instruction_set("avx512");
