"""Training with PyTorch Lightning; no other package imports it."""
