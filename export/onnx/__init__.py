"""ONNX packages that stock runtimes serve: lowering, optimization, files, and the check before one is handed over."""
