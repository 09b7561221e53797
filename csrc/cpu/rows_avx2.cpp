#include "rows.inc"

const gspo::InstructionSet gspo::kAvx2 = instruction_set("avx2");
