#if defined(__AVX512BF16__)
#include "products.inc"

static constexpr gspo::ProductInstructions kInstructions = product_instructions("avx512bf16");
const gspo::ProductInstructions* const gspo::kProductsAvx512Bf16 = &kInstructions;
#else  // this compiler does not know them
#include "products.h"

const gspo::ProductInstructions* const gspo::kProductsAvx512Bf16 = nullptr;
#endif
