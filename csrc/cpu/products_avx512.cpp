#include "products.inc"

const gspo::ProductInstructions gspo::kProductsAvx512 = product_instructions("avx512");
