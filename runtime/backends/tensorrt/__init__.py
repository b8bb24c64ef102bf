"""TensorRT and TensorRT-RTX: whole generations on the device."""
