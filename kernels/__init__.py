"""The hot operations of a step: definitions in plain torch, and their kernels. Imports torch and triton only."""
