"""The operations as Triton kernels. Importing a module of this package takes Triton; their callers import it late."""
