"""Files: tensors read and written, model files recognised and checked, metadata and conditioning."""
