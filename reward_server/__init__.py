"""The SAM 2 reward service: frozen segmentation behind gRPC. Imports torch, never jax or segzero_jax."""
