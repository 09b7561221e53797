#include "products.inc"

const gspo::ProductInstructions gspo::kProductsBaseline = product_instructions("baseline");
