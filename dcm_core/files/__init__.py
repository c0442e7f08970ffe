"""Files: read and write tensors, recognise and check model files, metadata and conditioning."""
