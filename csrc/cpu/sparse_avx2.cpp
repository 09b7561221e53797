#include "sparse.inc"

const gspo::SparseInstructions gspo::kSparseAvx2 = sparse_instructions();
