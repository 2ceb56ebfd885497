"""The original model in PyTorch: reference outputs in a child process."""
