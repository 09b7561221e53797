#include "products.inc"

const gspo::ProductInstructions gspo::kProductsAvx2 = product_instructions("avx2");
