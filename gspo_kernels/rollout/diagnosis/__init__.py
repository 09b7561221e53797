"""Why ratios are not 1 before the first update: the usual mistakes, tried one after the other."""
