#include "rows.inc"

const gspo::InstructionSet gspo::kBaseline = instruction_set("baseline");
