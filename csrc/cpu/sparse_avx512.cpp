#include "sparse.inc"

const gspo::SparseInstructions gspo::kSparseAvx512 = sparse_instructions();
