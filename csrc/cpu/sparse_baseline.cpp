#include "sparse.inc"

const gspo::SparseInstructions gspo::kSparseBaseline = sparse_instructions();
