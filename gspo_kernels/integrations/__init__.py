"""Our losses in the trainers of other libraries: a module for each, imported only where it is asked for."""
