"""What the library is compared with: the same methods, written as their equations are."""
