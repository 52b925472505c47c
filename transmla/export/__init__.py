"""Export: a stock DeepSeek-V3 checkpoint, checked by loading it without this package."""
