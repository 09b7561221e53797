"""The losses in other libraries' trainers: one module each, which is imported only by its users."""
